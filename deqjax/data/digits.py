"""The handwritten digits that scikit-learn carries: 1,797 grey images of 8 x 8, no download.

Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998), its test part.
"""

import numpy as np

from deqjax.data.image_set import ImageArrays


def digits(split: str) -> ImageArrays:
    """Every sixth image is the split "test" (300), the one after it "valid" (300), the rest "train" (1,197); "all" is the file.

    Grey values 0 to 16 are stretched over 8 bits. Writers come one after the other in the file, so they are the same in all
    splits; a split by writers would be harder.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the handwritten digits need scikit-learn: pip install "deqjax[vision]"') from error
    images, labels = load_digits(return_X_y=True)
    part = np.arange(len(labels)) % 6
    chosen = {"train": part > 1, "valid": part == 1, "test": part == 0, "all": part >= 0}[split]
    pixels = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return ImageArrays(pixels[chosen], labels[chosen].astype(np.int32), tuple("0123456789"))
