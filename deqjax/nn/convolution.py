"""Convolution, channels last, with a derivative that is as fast as itself."""

import functools
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from deqjax.core.annotations import Array, Inexact

# One number for every spatial axis, or one (for paddings, also a pair: before and after) for each.
PerAxis = int | Sequence[int] | Sequence[tuple[int, int]]


def conv(
    x: Inexact[Array, "B *space n_in"],
    kernel: Inexact[Array, "*window n_in_per_group n_out"],
    *,
    strides: PerAxis = 1,
    padding: str | PerAxis = "SAME",
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Inexact[Array, "B *new_space n_out"]:
    """Correlates x with a kernel over any number of spatial axes.

    Equal to `jax.lax.conv_general_dilated`, derivatives of every order and mode included. The adjoint solve of an
    equilibrium applies the transpose of the convolution at every step; on a CPU the compiler has a fast form only for
    kernels as they are here laid out, so the derivative keeps a transposed copy of the kernel in that layout.

    Args:
      strides: steps between the windows.
      padding: "SAME", "VALID", or zeros to add before and after each axis (PyTorch's is a number).
      dilation: distances between the kernel's entries.
      groups: blocks of channels that do not mix.
    """
    n = x.ndim - 2
    if not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in _per_axis(padding, n))
    return _conv(x, kernel, _per_axis(strides, n), padding, _per_axis(dilation, n), groups)


def _per_axis(value, n):
    value = (value,) * n if isinstance(value, int) else tuple(value)
    if len(value) != n:
        raise ValueError(f"{value} has {len(value)} entries for {n} spatial axes: give one number, or one for each axis.")
    return value


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _conv(x, kernel, strides, padding, dilation, groups):
    return _lax_conv(x, kernel, strides, padding, dilation, groups)


@_conv.defjvp
def _(strides, padding, dilation, groups, primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    of_dkernel = _lax_conv(x, dkernel, strides, padding, dilation, groups)
    if groups == 1 and jax.default_backend() == "cpu":
        # Reversed twice it is the same convolution, whose transpose is one with the kernel that is kept here. Without the
        # barrier the compiler would fold the copy away.
        window = tuple(range(kernel.ndim - 2))
        kept = jax.lax.optimization_barrier(jnp.swapaxes(jnp.flip(kernel, window), -1, -2))
        back = functools.partial(_lax_conv, dx, jnp.flip(kept, window), kernel_axes="OI")
        if dx.dtype == jnp.float64:
            # The compiler's transpose of a strided convolution then takes a hundred times as long as that of a sliced one.
            extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape, dilation, strict=False)]
            pads = jax.lax.padtype_to_pads(dx.shape[1:-1], extent, strides, padding) if isinstance(padding, str) else padding
            whole = back((1,) * len(strides), pads, dilation, groups)
            of_dx = whole[:, *(slice(None, None, s) for s in strides)]
        else:
            of_dx = back(strides, padding, dilation, groups)
    else:
        of_dx = _lax_conv(dx, kernel, strides, padding, dilation, groups)
    return _conv(x, kernel, strides, padding, dilation, groups), of_dx + of_dkernel


def _lax_conv(x, kernel, strides, padding, dilation, groups, kernel_axes="IO"):
    space = string.digits[: x.ndim - 2]
    layouts = (f"N{space}C", space + kernel_axes, f"N{space}C")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=layouts, feature_group_count=groups
    )
