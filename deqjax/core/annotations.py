"""Shapes and dtypes in signatures: `Float[Array, "B L D"]` is a floating-point array of three axes.

They are jaxtyping's, and the tests check them at every call. Without jaxtyping they say the same to a reader and nothing
to Python.
"""

from typing import Any

from jax import Array
from jax.typing import ArrayLike

try:
    from jaxtyping import Bool, Float, Inexact, Int, Key, PyTree, Shaped
except ImportError:

    class _Unchecked:
        def __class_getitem__(cls, item):
            return Any

    Bool = Float = Inexact = Int = Key = PyTree = Shaped = _Unchecked

# A state of B samples: any tree of floating-point arrays with the batch axis first.
State = PyTree[Inexact[Array, "B ..."]]

__all__ = ["Array", "ArrayLike", "Bool", "Float", "Inexact", "Int", "Key", "PyTree", "Shaped", "State"]
