"""Checksums of a train state: what is read back from a disk is what was written."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from deqjax.training.state import named_leaves


def described(tree) -> dict[str, list]:
    """Dtype, shape and a checksum of 32 bits of every array that holds anything, by its path; as JSON keeps it.

    Computed where the arrays are, in whole numbers, so that it is the same on any mesh; any one word that changes changes it.
    """
    leaves = {"/".join(path): leaf for path, leaf in named_leaves(tree).items() if leaf.size}
    sums = jax.device_get(_sums({name: _words(leaf) for name, leaf in leaves.items()}))
    return {name: [str(leaf.dtype), list(leaf.shape), int(sums[name])] for name, leaf in leaves.items()}


def changed(before: dict[str, list], now: dict[str, list]) -> list[str]:
    """The arrays that are not what they were; not those that are now of another dtype, or that were not there."""
    return [name for name, entry in now.items() if entry[0] == before.get(name, [None])[0] and entry != before[name]]


def _words(x):
    """NumPy arrays of 64 bits in words of 32, as `_sum` cuts them: JAX rounds them where it does not compute with 64."""
    return x.reshape(-1).view(np.uint32).reshape(*x.shape, 2) if isinstance(x, np.ndarray) and x.dtype.itemsize == 8 else x


@jax.jit
def _sums(leaves):
    return jax.tree.map(_sum, leaves)


def _sum(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    # 64 bits become two words, less than 32 are widened.
    words = jax.lax.bitcast_convert_type(x, np.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    total = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        total = total * np.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    # Odd weights, so that no change of a single word goes unseen.
    return jnp.sum(words * (total * np.uint32(0x85EBCA6B) * 2 + 1), dtype=jnp.uint32)


def sealed(meta: dict) -> dict:
    """Metadata, as JSON gives them back, with a checksum of their own."""
    meta = json.loads(json.dumps(meta, default=str))
    return meta | {"seal": _seal(meta)}


def is_intact(meta) -> bool:
    """Whether this, read as JSON, is sealed metadata as they were written."""
    return isinstance(meta, dict) and meta.get("seal") == _seal({name: x for name, x in meta.items() if name != "seal"})


def _seal(meta) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
