"""The maps that `benchmarks.solvers` iterates, in JAX and in PyTorch, from the same NumPy weights."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """One fixed-point problem.

    Attributes:
      shapes: of the state's leaves.
      steps: how many evaluations a solve takes here, or takes at most.
      weights: NumPy arrays.
      in_jax, in_torch, in_numpy: from weights (arrays of the framework) to f, a function of the list of leaves.
      samples: "own way": this library and TorchDEQ solve every sample for itself, the JAX peers see the batch as one problem;
        "each": the peers too solve every sample for itself, by `jax.vmap`; "one": this library too sees one problem.
    """

    shapes: tuple
    steps: int
    weights: dict
    in_jax: Callable
    in_torch: Callable
    in_numpy: Callable | None = None
    samples: str = "own way"


def problems() -> dict[str, Problem]:
    """All of them, by name, in float32."""
    return {
        "tanh [32, 4096]": _tanh(32, 4096, 20),
        "transformer [8, 256, 512]": _transformer(8, 256, 512, 8),
        "MDEQ's block, two scales": _multiscale(8, 32, 32, 12, expansion=5),
        "MDEQ's block, not expanded": _multiscale(8, 32, 32, 12, expansion=1),
        "tiny [8192, 16], each for itself": dataclasses.replace(_tanh(8192, 16, 40), samples="each"),
        "tiny [8192, 16], as one problem": dataclasses.replace(_tanh(8192, 16, 40), samples="one"),
    }


def linear_problems() -> dict[str, Problem]:
    """z = A z + x for matrices of several spectra, `[8, 256]`: where plain iteration is slow, or does not converge."""
    random, n = np.random.default_rng(3), 256

    def symmetric(lowest, highest):
        basis = np.linalg.qr(random.normal(size=(n, n)))[0]
        return basis @ np.diag(np.linspace(lowest, highest, n)) @ basis.T

    def unstructured(radius):
        matrix = random.normal(size=(n, n))
        return radius * matrix / np.max(np.abs(np.linalg.eigvals(matrix)))

    return {
        "symmetric, -0.3 to 0.9": _linear(symmetric(-0.3, 0.9), 300),
        "symmetric, -0.3 to 0.99": _linear(symmetric(-0.3, 0.99), 300),
        "non-normal, radius 0.9": _linear(unstructured(0.9), 300),
        "non-normal, radius 0.97": _linear(unstructured(0.97), 300),
    }


def _linear(matrix, steps, batch=8):
    x = np.random.default_rng(4).normal(size=(batch, matrix.shape[0]))
    weights = {"A": matrix.T.astype(np.float32), "x": x.astype(np.float32)}
    f_of = lambda w: lambda z: [z[0] @ w["A"] + w["x"]]  # noqa: E731
    return Problem((x.shape,), steps, weights, f_of, f_of, f_of)


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


def _multiscale(batch, size, channels, steps, expansion, groups=8):
    """The block of MDEQ at two resolutions: residual units with the injection, then their fusion. JAX has channels last.

    The published models expand the channels inside a unit by 5.
    """
    random, inner = np.random.default_rng(2), expansion * channels
    kernels = {"down": (3, 3, channels, channels), "up": (1, 1, channels, channels)}
    for scale in ("high", "low"):
        kernels |= {f"first_{scale}": (3, 3, channels, inner), f"second_{scale}": (3, 3, inner, channels)}
    weights = {name: _normal(random, *shape, scale=np.prod(shape[:3]) ** -0.5) for name, shape in kernels.items()}
    shapes = ((batch, size, size, channels), (batch, size // 2, size // 2, channels))
    weights |= {"x_high": _normal(random, *shapes[0]), "x_low": _normal(random, *shapes[1])}

    def in_jax(w):
        import jax
        import jax.numpy as jnp

        from deqjax.nn.convolution import conv
        from deqjax.nn.group_norm import group_norm

        def norm(z):
            return group_norm(z, groups)

        def unit(z, scale):
            inner = jax.nn.relu(norm(conv(z, w[f"first_{scale}"])))
            return jax.nn.relu(norm(conv(inner, w[f"second_{scale}"]) + w[f"x_{scale}"] + z))

        def f(z):
            high, low = unit(z[0], "high"), unit(z[1], "low")
            raised = jnp.repeat(jnp.repeat(conv(low, w["up"]), 2, axis=1), 2, axis=2)
            return [jax.nn.relu(norm(high + raised)), jax.nn.relu(norm(low + conv(high, w["down"], strides=2, padding=1)))]

        return f

    def in_torch(w):
        import torch.nn.functional as F

        w = {name: a.permute(3, 2, 0, 1) if name in kernels else a.permute(0, 3, 1, 2) for name, a in w.items()}
        w = {name: a.contiguous() for name, a in w.items()}

        def norm(z):
            return F.group_norm(z, groups)

        def unit(z, scale):
            inner = F.relu(norm(F.conv2d(z, w[f"first_{scale}"], padding=1)))
            return F.relu(norm(F.conv2d(inner, w[f"second_{scale}"], padding=1) + w[f"x_{scale}"] + z))

        def f(z):
            high, low = unit(z[0], "high"), unit(z[1], "low")
            raised = F.interpolate(F.conv2d(low, w["up"]), scale_factor=2, mode="nearest")
            down = F.conv2d(high, w["down"], stride=2, padding=1)
            return [F.relu(norm(high + raised)), F.relu(norm(low + down))]

        return f

    return Problem(shapes, steps, weights, in_jax, in_torch)
