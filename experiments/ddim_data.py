"""The images that a config of a diffusion model names."""

from deqjax.data.celeba import celeba
from deqjax.data.cifar import cifar10
from deqjax.data.errors import DataError
from deqjax.data.image_lmdb import ffhq, lsun
from deqjax.data.unlabelled_images import Images, folder, padded_digits, split

DATA = ("digits", "cifar10", "celeba", "lsun_bedroom", "lsun_church_outdoor", "lsun_cat", "ffhq", "folder")


def read(config) -> dict[str, Images]:
    """Images to train on and images held out, of the model's size, under "train" and "test".

    Raises:
      DataError: they are missing or damaged, or cannot have that size.
    """
    data, size, channels = config.data, config.model.image_size, config.model.image_channels
    if data.name == "digits":
        train, test = padded_digits(size)
    elif data.name == "cifar10":
        train, test = (cifar10(data.dir, part).images for part in ("train", "test"))
    elif data.name == "celeba":
        splits = celeba(data.dir, size)
        train, test = splits["train"], splits["test"]
    elif data.name.startswith("lsun_"):
        category = data.name.removeprefix("lsun_")
        # The published validation sets have 300 images.
        train, test = (lsun(data.dir, category, size, part) for part in ("train", "val"))
    elif data.name == "ffhq":
        train, test = ffhq(data.dir, size)
    else:
        train, test = split(folder(data.dir, size, channels), data.held_out)
    shape = train[0].shape if len(train) else (size, size, channels)
    if shape != (size, size, channels):
        found, wanted = ("x".join(map(str, shape)) for shape in (shape, (size, size, channels)))
        raise DataError(f"images of {found} ({data.name}) for a model of {wanted}: set model.image_size, model.image_channels.")
    return {"train": train, "test": test}
