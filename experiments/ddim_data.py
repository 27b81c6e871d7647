"""The images that a config of a diffusion model names."""

from deqjax.data.image_sets import ImageSet, digits, folder, split

DATA = ("digits", "folder")


def read(config) -> dict[str, ImageSet]:
    """Images to train on and images held out, of the model's size, under "train" and "test".

    Raises:
      DataError: they are missing or damaged.
    """
    data, size, channels = config.data, config.model.image_size, config.model.image_channels
    if data.name == "digits":
        train, test = digits(size)
    else:
        train, test = split(folder(data.dir, size, channels), data.held_out)
    return {"train": train, "test": test}
