"""Lowering for hardware that is not here."""

import jax
from jax import export

PLATFORMS = ("tpu", "cuda", "cpu")


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def lowers_everywhere(function, *arguments) -> None:
    """Fails unless a function lowers for TPUs, NVIDIA GPUs and CPUs, given arguments or their shapes."""
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*shapes_of(arguments))
    assert exported.platforms == PLATFORMS and exported.mlir_module_serialized
