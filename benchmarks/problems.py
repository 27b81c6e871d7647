"""The maps that `benchmarks.solvers` iterates, in JAX and in PyTorch, from the same NumPy weights."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """One fixed-point problem.

    Attributes:
      shapes: of the state's leaves.
      steps: how many evaluations a solve takes here.
      weights: NumPy arrays.
      in_jax, in_torch: from weights (arrays of the framework) to f, a function of the list of leaves.
    """

    shapes: tuple
    steps: int
    weights: dict
    in_jax: Callable
    in_torch: Callable


def problems() -> dict[str, Problem]:
    """All of them, by name, in float32."""
    return {
        "tanh [32, 4096]": _tanh(32, 4096, 20),
        "transformer [8, 256, 512]": _transformer(8, 256, 512, 8),
        "conv, two scales": _conv(8, 32, 32, 12),
        "tiny [8192, 16]": _tanh(8192, 16, 40),
    }


def _normal(random, *shape, scale=1.0):
    return (scale * random.normal(size=shape)).astype(np.float32)


def _tanh(batch, width, steps):
    random = np.random.default_rng(0)
    weights = {"W": _normal(random, width, width, scale=0.5 / width**0.5), "x": _normal(random, batch, width)}

    def in_jax(w):
        import jax.numpy as jnp

        return lambda z: [jnp.tanh(z[0] @ w["W"] + w["x"])]

    def in_torch(w):
        import torch

        return lambda z: [torch.tanh(z[0] @ w["W"] + w["x"])]

    return Problem(((batch, width),), steps, weights, in_jax, in_torch)


def _transformer(batch, length, width, steps, heads=8):
    random = np.random.default_rng(1)
    scale = 0.5 / width**0.5
    weights = {
        "qkv": _normal(random, width, 3 * width, scale=scale),
        "out": _normal(random, width, width, scale=scale),
        "up": _normal(random, width, 4 * width, scale=scale),
        "down": _normal(random, 4 * width, width, scale=scale / 2),
        "x": _normal(random, batch, length, width),
    }

    def in_jax(w):
        import jax
        import jax.numpy as jnp

        def norm(z):
            z = z - jnp.mean(z, axis=-1, keepdims=True)
            return z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + 1e-5)

        def f(z):
            z = z[0]
            q, k, v = jnp.moveaxis((z @ w["qkv"]).reshape(batch, length, 3, heads, -1), 2, 0)
            scores = jnp.einsum("blhd,bkhd->bhlk", q, k) / (width // heads) ** 0.5
            a = jnp.einsum("bhlk,bkhd->blhd", jax.nn.softmax(scores), v).reshape(z.shape)
            z = norm(a @ w["out"] + w["x"])
            return [norm(z + jax.nn.relu(z @ w["up"]) @ w["down"])]

        return f

    def in_torch(w):
        import torch

        def norm(z):
            return torch.nn.functional.layer_norm(z, (width,))

        def f(z):
            z = z[0]
            q, k, v = (z @ w["qkv"]).reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
            a = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(z.shape)
            z = norm(a @ w["out"] + w["x"])
            return [norm(z + torch.relu(z @ w["up"]) @ w["down"])]

        return f

    return Problem(((batch, length, width),), steps, weights, in_jax, in_torch)


def _conv(batch, size, channels, steps):
    """Two resolutions, each its own convolution, fused by pooling down and repeating up; channels last in JAX."""
    random = np.random.default_rng(2)
    scale = 0.3 / (9 * channels) ** 0.5
    names = ("high", "low", "down", "up")
    weights = {name: _normal(random, 3, 3, channels, channels, scale=scale) for name in names}
    weights |= {"x": _normal(random, batch, size, size, channels)}
    shapes = ((batch, size, size, channels), (batch, size // 2, size // 2, channels))

    def in_jax(w):
        import jax
        import jax.numpy as jnp

        def conv(z, kernel):
            return jax.lax.conv_general_dilated(z, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        def f(z):
            high, low = z
            pooled = jnp.mean(high.reshape(batch, size // 2, 2, size // 2, 2, channels), axis=(2, 4))
            raised = jnp.repeat(jnp.repeat(conv(low, w["up"]), 2, axis=1), 2, axis=2)
            return [jnp.tanh(conv(high, w["high"]) + raised + w["x"]), jnp.tanh(conv(low, w["low"]) + conv(pooled, w["down"]))]

        return f

    def in_torch(w):
        import torch

        kernels = {name: w[name].permute(3, 2, 0, 1).contiguous() for name in names}
        x = w["x"].permute(0, 3, 1, 2).contiguous()

        def conv(z, name):
            return torch.nn.functional.conv2d(z, kernels[name], padding=1)

        def f(z):
            high, low = z
            pooled = torch.nn.functional.avg_pool2d(high, 2)
            raised = conv(low, "up").repeat_interleave(2, 2).repeat_interleave(2, 3)
            return [torch.tanh(conv(high, "high") + raised + x), torch.tanh(conv(low, "low") + conv(pooled, "down"))]

        return f

    return Problem(shapes, steps, weights, in_jax, in_torch)
