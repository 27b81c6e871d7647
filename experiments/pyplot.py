"""Matplotlib for pictures that go into files."""

import os

from deqjax.training.errors import UserError


def pyplot():
    """`matplotlib.pyplot`, without windows. In a notebook the figures of its own cells still show.

    Raises:
      UserError: Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError('pictures need Matplotlib: pip install "deqjax[viz]"') from error
    # Jupyter names its own backend this way; to change it would hide every later figure.
    if not os.environ.get("MPLBACKEND", "").startswith("module://"):
        matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
