"""How the large matrices are split over devices: tensor parallelism in the manner of Megatron-LM (arXiv 1909.08053)."""

from deqjax.models.transformer.config import TransformerConfig


def layout(config: TransformerConfig) -> list[tuple[str, int, int]]:
    """Which axis of which parameter may be split, and of how many units that have to stay whole it consists.

    Feed-forward layers and attention are split where their inner features are, so that each costs one sum over the
    devices per application of f; the clusters of the vocabulary by words.

    Returns:
      `(pattern, axis, units)`: see `deqjax.training.layout`.
    """
    heads, inner = config.n_head, config.d_inner
    rules = [
        (r"inner/(scale|bias)", 0, inner),
        (r"inner/kernel", 1, inner),
        (r"outer/kernel", 0, inner),
        (r"attention/(content|position)_bias", 0, heads),
        (r"attention/position/(scale|bias)", 0, heads),
        (r"attention/position/kernel", 1, heads),
        (r"attention/output/kernel", 0, heads),
        (r"attention/norm_out/", 0, heads),
    ]
    if config.interleaved:
        # In thirds, a head's queries, keys and values lie apart: that matrix stays whole.
        rules += [(r"attention/qkv/(scale|bias)", 0, heads), (r"attention/qkv/kernel", 1, heads)]
    sizes = [b - a for a, b in zip(config.cluster_ends[:-1], config.cluster_ends[1:], strict=True)]
    for i, size in enumerate(sizes if config.div_val > 1 else [config.n_tokens]):
        rules.append((rf"(tables|softmax/biases)/{i}\b", 0, size))
    return rules
