"""The handwritten digits that scikit-learn carries: 1,797 grey images of 8 x 8, no download.

Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998), its test part.
"""

import numpy as np

from deqjax.data.image_set import ImageArrays


def digits(split: str) -> ImageArrays:
    """ "train" (1,297 images), "valid" (200) or "test" (300); grey values 0 to 16 are stretched over 8 bits.

    The order of the file is kept, writers come one after the other in it: those who test did not write what trains.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the handwritten digits need scikit-learn: pip install "deqjax[vision]"') from error
    images, labels = load_digits(return_X_y=True)
    bounds = {"train": (0, 1297), "valid": (1297, 1497), "test": (1497, 1797)}[split]
    pixels = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return ImageArrays(pixels[slice(*bounds)], labels[slice(*bounds)].astype(np.int32), tuple("0123456789"))
