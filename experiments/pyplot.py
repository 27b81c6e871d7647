"""Matplotlib for pictures that go into files."""

from deqjax.training.errors import UserError


def pyplot():
    """`matplotlib.pyplot`, without windows. A notebook goes on drawing into its page.

    Raises:
      UserError: Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError('pictures need Matplotlib: pip install "deqjax[viz]"') from error
    if "inline" not in matplotlib.get_backend():
        matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
