"""What image models are judged by: accuracy of the k best classes, and the confusion of every class with every other."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.image_losses import IGNORED


def top_k(logits, labels, k: int):
    """Whether the label is among the k highest logits; `[...]` booleans.

    Args:
      logits: `[..., C]`.
      labels: `[...]`.
    """
    _, best = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.any(best == labels[..., None], axis=-1)


def confusion_matrix(predictions, labels, n_classes: int):
    """How often a pixel of class i was taken for class j: `[C, C]`, the true class first. Ignored pixels count nowhere.

    Args:
      predictions, labels: `[...]` integers.
    """
    valid = labels != IGNORED
    cells = jnp.where(valid, labels * n_classes + predictions, n_classes**2)
    return jnp.bincount(cells.reshape(-1), length=n_classes**2 + 1)[:-1].reshape(n_classes, n_classes)


def segmentation_scores(counts) -> dict:
    """Scores of a confusion matrix: `iou` `[C]`, its mean `miou`, `pixel_accuracy` and `mean_accuracy`.

    A class that is neither there nor predicted scores 0 and counts, as in the originals.
    """
    counts = np.asarray(jax.device_get(counts), np.float64)
    hit, true, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    iou = hit / np.maximum(1, true + predicted - hit)
    return {
        "iou": iou,
        "miou": float(iou.mean()),
        "pixel_accuracy": float(hit.sum() / max(1, true.sum())),
        "mean_accuracy": float((hit / np.maximum(1, true)).mean()),
    }
