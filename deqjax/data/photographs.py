"""Pictures that come with scikit-image and scikit-learn: real, and nothing to download."""

import numpy as np

from deqjax.data.errors import DataError
from deqjax.data.images import quantized

# Those in scikit-image's wheel itself. Camera and coffee are CC0, astronaut and rocket public domain (NASA).
SKIMAGE = (
    *("camera", "astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "retina", "immunohistochemistry"),
    *("brick", "grass", "gravel", "coins", "clock", "moon", "page", "text", "cell", "motorcycle"),
)
SKLEARN = ("china", "flower")
NAMES = (*SKIMAGE, *SKLEARN)


def photograph(name: str) -> np.ndarray:
    """A picture by its name, `[H, W, 1 or 3]`, 8 bits.

    Raises:
      DataError: there is no such picture.
      ImportError: the package that has it is not installed.
    """
    if name not in NAMES:
        raise DataError(f"there is no picture called {name!r}. There are: {', '.join(NAMES)}.")
    if name in SKLEARN:
        image = _import("sklearn.datasets").load_sample_image(f"{name}.jpg")
    elif name == "motorcycle":
        image, *_ = _import("skimage.data").stereo_motorcycle()  # the left one
    else:
        image = getattr(_import("skimage.data"), name)()
    return image[..., None] if image.ndim == 2 else image


def faces(count: int = 100) -> np.ndarray:
    """Grey pictures of 25 x 25 pixels, the first 100 of faces, `[count, 25, 25, 1]`, 8 bits (scikit-image's subset of LFW).

    Raises:
      DataError: there are not as many.
    """
    everything = _import("skimage.data").lfw_subset()
    if not 1 <= count <= len(everything):
        raise DataError(f"{count} faces were asked for; there are 1 to {len(everything)}.")
    return quantized(everything[:count])[..., None]


def _import(module):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'this picture comes with {module.split(".")[0]}: pip install "deqjax[vision]"') from error
