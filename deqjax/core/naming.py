"""Names: one that a reader mistyped, and those of a tree's leaves."""

import difflib
from collections.abc import Iterable
from typing import Any

import jax


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: `; did you mean 'x'?` with the closest known one, or a full stop."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


def leaf_path(key_path) -> tuple[str, ...]:
    """The names on the way to a leaf, e.g. `("cell", "layers", "0", "kernel")`.

    That a leaf sits inside an `nnx.Variable` is left out: it is no part of its name.
    """
    names = []
    for entry in key_path:
        name = next(str(getattr(entry, field)) for field in ("key", "name", "idx") if hasattr(entry, field))
        if not (isinstance(entry, jax.tree_util.GetAttrKey) and name == "value"):
            names.append(name)
    return tuple(names)
