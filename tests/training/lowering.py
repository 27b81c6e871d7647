"""Lowering for hardware that is not here."""

import jax
from jax import export
from jax.sharding import NamedSharding

PLATFORMS = ("tpu", "cuda", "cpu")


def shapes_of(tree):
    """Shapes, with their shardings where they are on a mesh."""

    def shape(x):
        sharding = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if isinstance(sharding, NamedSharding) else None)

    return jax.tree.map(shape, tree)


def lowers_everywhere(function, *arguments) -> None:
    """Fails unless a function lowers for TPUs, NVIDIA GPUs and CPUs, given arguments or their shapes."""
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*shapes_of(arguments))
    assert exported.platforms == PLATFORMS and exported.mlir_module_serialized
