"""What graph networks are judged by: accuracy of classes, F1 of label sets."""

import jax
import jax.numpy as jnp
import numpy as np


def most_probable(logits, k):
    """The k highest of each row as zeros and ones, k `[N]` a number per row (Amazon's rule: as many as are true).

    Args:
      logits: `[N, C]`.
      k: `[N]`; none for a row of k = 0.
    """
    rank = jnp.argsort(jnp.argsort(-logits, axis=-1), axis=-1)
    return (rank < k[:, None]).astype(jnp.int32)


def label_counts(predicted, labels, weights):
    """True positives, false positives and false negatives of every class, `[3, C]`, over rows of weight 1.

    Args:
      predicted, labels: `[N, C]` zeros and ones.
      weights: `[N]`, 0 for rows that do not count.
    """
    predicted, labels = (jnp.asarray(x) > 0 for x in (predicted, labels))
    counted = (jnp.asarray(weights) > 0)[:, None]
    parts = predicted & labels, predicted & ~labels, ~predicted & labels
    return jnp.stack([jnp.sum(part & counted, axis=0) for part in parts])


def f1_scores(counts) -> dict[str, float]:
    """Micro and macro F1 from summed `label_counts`; a class that neither occurs nor is predicted scores 0."""
    counts = np.asarray(jax.device_get(counts), np.float64)

    def score(tp, fp, fn):
        below = 2 * tp + fp + fn
        return np.where(below > 0, 2 * tp / np.where(below > 0, below, 1), 0)

    return {"f1": float(score(*counts.sum(axis=1))), "f1_macro": float(np.mean(score(*counts)))}
