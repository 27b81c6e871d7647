"""Losses of image models: cross entropy with ignored pixels and class weights, and that of the hardest pixels alone."""

import jax
import jax.numpy as jnp

IGNORED = 255  # the label of pixels that count nowhere


def cross_entropy_sums(logits, labels, *, weights=None):
    """Sum of the weighted losses, and the sum of the weights, over all that is not ignored.

    Args:
      logits: `[..., C]`.
      labels: `[...]` integers; 255 is ignored.
      weights: `[C]` of the classes, or None.
    """
    losses, weights = _weighted_losses(logits, labels, weights)
    return jnp.sum(losses), jnp.sum(weights)


def cross_entropy(logits, labels, *, weights=None):
    """The weighted mean, PyTorch's: sum(w * loss) / sum(w)."""
    total, weight = cross_entropy_sums(logits, labels, weights=weights)
    return total / jnp.where(weight > 0, weight, 1)


def ohem_cross_entropy(logits, labels, *, weights=None, threshold: float, min_kept: int):
    """Online hard example mining: the plain mean of the weighted losses of pixels whose true class has a low probability.

    Low is below the threshold, or below that of the pixel number `min_kept` in rising order, if this is higher.
    """
    losses, _ = _weighted_losses(logits, labels, weights)
    valid = labels != IGNORED
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits), jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
    # Ignored pixels come last, beyond any probability.
    rising = jnp.sort(jnp.where(valid, probabilities, 2.0).reshape(-1))
    n_valid = jnp.sum(valid)
    at = rising[jnp.clip(jnp.minimum(min_kept, n_valid - 1), 0, rising.size - 1)]
    kept = valid & (probabilities < jax.lax.stop_gradient(jnp.maximum(at, threshold)))
    return jnp.sum(jnp.where(kept, losses, 0)) / jnp.maximum(jnp.sum(kept), 1)


def _weighted_losses(logits, labels, weights):
    """The loss of every pixel times its weight, and the weights; both zero where the label is ignored."""
    valid = labels != IGNORED
    labels = jnp.where(valid, labels, 0)
    of_class = jnp.ones((logits.shape[-1],), logits.dtype) if weights is None else jnp.asarray(weights, logits.dtype)
    weights = jnp.where(valid, of_class[labels], 0)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return weights * losses, weights
