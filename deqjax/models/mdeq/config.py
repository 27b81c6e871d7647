"""Sizes and variants of the multiscale networks, the published ones by name."""

import dataclasses
from collections.abc import Sequence

from deqjax.core.naming import did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class MDEQConfig:
    """A multiscale network: n feature maps, each half the size of the one before.

    Attributes:
      head: "classification" or "segmentation".
      n_classes: of the output.
      channels: C_i of every map.
      head_channels: h_i of the classification head, a quarter of its channels at every map.
      final_channels: of the features that the classifier sees.
      final_kernel: of the segmentation head's last convolution, 1 or 3.
      n_blocks: residual blocks on every map, one number or one for each.
      n_groups: of the group normalisations; those after the fusion have half as many.
      expansion: inner channels of a residual block, as a multiple of C_i.
      big_kernels: of every map, or (): 1 makes the first convolution of its blocks 5x5, 2 both.
      downsample: how often the stem halves the image.
      in_channels: of the image.
      dropout: rate of the variational dropout of whole channels in every residual block.
      block_affine, fuse_affine, post_affine: whether the group normalisations in blocks, fusion and after it learn scales.
      normalized: which convolutions of f have normalised weights (`norm_type` of the equilibrium layer): "all" (TorchDEQ's
        CIFAR code), "branches" (its ImageNet code: those in residual blocks) or "branches_and_post" (the authors' code:
        those and the ones after the fusion).
      init: of convolutions: "normal" with standard deviation 0.01, biases too, or "uniform", PyTorch's default, with which
        TorchDEQ's ImageNet code leaves them.
      init_normalized: let "normal" reach the weight-normalised kernels as well. In the originals it misses them: they keep
        the uniform distribution.
      batch_norm_momentum: of the batch normalisations in stem and head.
      dtype: "bfloat16" for the convolutions and what passes between them in stem and head; all normalisation, and the sums and
        the state of f, stay in float32.
    """

    head: str
    n_classes: int
    channels: Sequence[int]
    head_channels: Sequence[int] = ()
    final_channels: int = 0
    final_kernel: int = 1
    n_blocks: int | Sequence[int] = 1
    n_groups: int = 8
    expansion: float = 5
    big_kernels: Sequence[int] = ()
    downsample: int = 0
    in_channels: int = 3
    dropout: float = 0.0
    block_affine: bool = True
    fuse_affine: bool = True
    post_affine: bool = True
    normalized: str = "all"
    init: str = "normal"
    init_normalized: bool = False
    batch_norm_momentum: float = 0.1
    dtype: str | None = None

    def __post_init__(self):
        n = len(self.channels)
        if n < 1:
            raise ValueError("channels=(): a network has at least one feature map.")
        blocks = (self.n_blocks,) * n if isinstance(self.n_blocks, int) else self.n_blocks
        per_map = {"channels": self.channels, "n_blocks": blocks, "big_kernels": self.big_kernels or (0,) * n}
        if self.head == "classification":
            per_map["head_channels"] = self.head_channels
        for name, values in per_map.items():
            object.__setattr__(self, name, tuple(values))
            least = 0 if name == "big_kernels" else 1
            if len(values) != n or min(values) < least:
                raise ValueError(f"{name}={tuple(values)}: needs {n} numbers, one for each map, {least} or more.")
        for name, allowed in (
            ("head", ("classification", "segmentation")),
            ("normalized", ("all", "branches", "branches_and_post")),
            ("init", ("normal", "uniform")),
            ("final_kernel", (1, 3)),
            ("dtype", (None, "float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}.")
        least = {"n_classes": 1, "downsample": 0, "in_channels": 1, "n_groups": 2 if n > 1 else 1}
        least |= {"final_channels": 1} if self.head == "classification" else {}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)}: must be {minimum} or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must lie between 0 and 1.")
        for C in self.channels:
            inner = int(self.expansion * C)
            if C % self.n_groups or inner % self.n_groups or inner < 1:
                raise ValueError(
                    f"n_groups={self.n_groups} must divide the channels of every map and of its blocks; here one has {C}, and "
                    f"{inner} in its blocks (expansion={self.expansion})."
                )

    @property
    def has_stage0(self) -> bool:
        """Whether a pointwise convolution follows the stem, as everywhere but in the smallest CIFAR networks."""
        return self.downsample > 0 or len(self.channels) > 2

    @property
    def image_multiple(self) -> int:
        """Height and width of an image must be multiples of this."""
        return 2 ** (self.downsample + len(self.channels) - 1)

    @classmethod
    def published(cls, size: str, **changes) -> "MDEQConfig":
        """A published network by its name in `SIZES`, with some fields changed.

        Raises:
          ValueError: there is none of that name.
        """
        if size not in SIZES:
            raise ValueError(f"size={size!r}{did_you_mean(size, SIZES)} Published: {', '.join(SIZES)}.")
        return cls(**SIZES[size] | changes)


_FOUR = {"channels": (32, 64, 128, 256), "n_groups": 8, "expansion": 5}
_LARGE = _FOUR | {"channels": (80, 160, 320, 640)}
_XL = _FOUR | {"channels": (88, 176, 352, 704), "expansion": 6}
# TorchDEQ's zoo, and the authors' second version ("vision").
_CIFAR = {"head": "classification", "n_classes": 10, "downsample": 0}
_CIFAR_VISION = _CIFAR | {"normalized": "branches_and_post", "post_affine": False}
_CIFAR_TWO = {"channels": (24, 24), "head_channels": (8, 16), "final_channels": 200, "n_groups": 8, "expansion": 5}
_CIFAR_FOUR = _FOUR | {"head_channels": (14, 28, 56, 112), "final_channels": 1680}
_IMAGENET = {"head": "classification", "n_classes": 1000, "downsample": 2, "final_channels": 2048}
_IMAGENET_VISION = _IMAGENET | {"normalized": "branches_and_post"}
_SMALL_HEAD, _LARGE_HEAD = {"head_channels": (24, 48, 96, 192)}, {"head_channels": (32, 64, 128, 256)}
_CITYSCAPES = {"head": "segmentation", "n_classes": 19, "downsample": 2, "normalized": "branches_and_post"}
_CITYSCAPES |= {"batch_norm_momentum": 0.01}
_REGULARISED = {"post_affine": False}

SIZES: dict[str, dict] = {
    "cifar10_small": _CIFAR | _CIFAR_TWO,
    "cifar10_large": _CIFAR | _CIFAR_FOUR,
    "cifar10_tiny": _CIFAR_VISION | _CIFAR_TWO | {"dropout": 0.25},
    "cifar10_large_ift": _CIFAR_VISION | _CIFAR_FOUR | {"dropout": 0.3},
    "cifar10_large_reg": _CIFAR_VISION | _CIFAR_FOUR | {"dropout": 0.22},
    "imagenet_small": _IMAGENET | _FOUR | _SMALL_HEAD | {"normalized": "branches", "init": "uniform"},
    "imagenet_small_ift": _IMAGENET_VISION | _FOUR | _SMALL_HEAD,
    "imagenet_small_reg": _IMAGENET_VISION | _FOUR | _REGULARISED | {"head_channels": (28, 56, 112, 224), "dropout": 0.02},
    "imagenet_large": _IMAGENET_VISION | _LARGE | _LARGE_HEAD,
    "imagenet_large_reg": _IMAGENET_VISION | _LARGE | _LARGE_HEAD | _REGULARISED,
    "imagenet_xl": _IMAGENET_VISION | _XL | _LARGE_HEAD,
    "cityscapes_small": _CITYSCAPES | _FOUR | {"dropout": 0.05},
    "cityscapes_large": _CITYSCAPES | _LARGE | {"dropout": 0.03},
    "cityscapes_xl": _CITYSCAPES | _XL | {"dropout": 0.04},
}
