"""What graph networks are judged by: accuracy of classes, F1 of label sets."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deqjax.core.stats import SolverStats


def accuracy(logits, labels):
    """1 where the label has the highest logit, 0 where it has not, and of a tie of k what a guess among them would earn, 1 / k.

    States that are all zero, as of nodes that nothing has reached, give such ties; the first class is no better there.

    Args:
      logits: `[..., C]`.
      labels: `[...]`.
    """
    highest = logits == jnp.max(logits, axis=-1, keepdims=True)
    theirs = jnp.take_along_axis(highest, labels[..., None], axis=-1)[..., 0]
    return theirs / jnp.sum(highest, axis=-1)


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


def solve_sums(all_stats: Sequence[SolverStats], real: jax.Array) -> list[dict]:
    """Sums of each solve over the graphs that are `real`, `[G]`, no padding; or over all rows if those are the samples."""
    return [stats.sums(real if stats.steps.shape == real.shape else None) for stats in all_stats]
