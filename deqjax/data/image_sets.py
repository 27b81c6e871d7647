"""The sets of pictures of the published recipes: NumPy files that their authors hand out."""

import pathlib

import numpy as np

from deqjax.data.errors import DataError

# Name -> file, array in it, and where it comes from.
SETS = {
    "celeba": ("celeba_128_tiny.npy", None, "the authors of (Implicit)^2 link it from the page of their code"),
    "nature": ("data_div2k.npz", "test_data", "it belongs to the code of Fourier Feature Networks (Tancik et al. 2020)"),
    "text": ("data_2d_text.npz", "test_data", "it belongs to the code of Fourier Feature Networks (Tancik et al. 2020)"),
}


def image_set(name: str, directory, count: int = 100) -> np.ndarray:
    """The first `count` pictures, `[S, H, W, 3]`, from 0 to 255.

    Raises:
      DataError: the file is missing, or does not hold such pictures.
    """
    if name not in SETS:
        raise DataError(f"there is no set of pictures called {name!r}. There are: {', '.join(SETS)}.")
    file, key, source = SETS[name]
    path = pathlib.Path(directory) / file
    if not path.is_file():
        where = f"the array {key!r} [S, H, W, 3]" if key else "an array that reshapes to [S, 128, 128, 3]"
        raise DataError(
            f"{path} is missing: {where} of numbers from 0 to 255; {source}. configs/inr_camera.py needs no such file."
        )
    try:
        loaded = np.load(path, allow_pickle=False)
        array = loaded[key] if key else loaded.reshape(-1, 128, 128, 3)
    except Exception as error:  # what a damaged archive, or one with the name of a plain array, raises has no end
        raise DataError(f"{path} cannot be read as the set {name!r}: {error}.") from error
    if array.ndim != 4 or array.shape[-1] != 3 or not array.size:
        raise DataError(f"{path} holds an array of shape {list(array.shape)}; pictures [S, H, W, 3] are needed.")
    if not np.all(np.isfinite(array)) or array.min() < 0 or array.max() > 255:
        raise DataError(f"{path} holds numbers outside 0 to 255.")
    if array.dtype.kind == "f" and array.max() <= 1:
        raise DataError(f"{path} holds numbers from 0 to 1, which would be black pictures; save it with 0 to 255.")
    return array[:count]
