"""Sizes and variants of the DEQ transformer."""

import dataclasses
import warnings
from collections.abc import Sequence

import jax

from deqjax.core.annotations import Array, Float, Key
from deqjax.nn.config import DEQConfig

# The originals read local_size=0 as this window, whatever the memory.
DEFAULT_WINDOW = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Architecture of one of the two published recipes, or between them.

    Attributes:
      recipe: "deq-lm": affine layer norms, one more after the attention, `n_layer` different blocks in f, queries, keys
        and values interleaved by head. "deq-seq": no affine, one block, queries, keys and values in thirds.
      norm: "pre" (reads z through a layer norm and adds to it: f(z + c) = f(z) + c, so f has no fixed point and is
        unrolled by recipe), "pre_bounded" (the feed-forward layer adds to its normalised input, as in the 2021 code),
        or "post" (the state is the output of a layer norm; a true equilibrium).
      n_tokens: vocabulary size.
      cutoffs: boundaries of the adaptive embedding and softmax; empty for an ordinary softmax.
      div_val: each further cluster's embedding is this many times narrower.
      d_embed: embedding width; None is d_model.
      tie_weights: softmax tables are the embedding tables.
      tie_projections: "shared" ties the projections of the tail clusters; "upstream" keeps two parameters to be
        updated twice over, as the originals do (see `deqjax.optim.optimizer.tie_updates`); "none" leaves them apart.
      local_size: attention window; 0 is the originals' 1000, None is unlimited.
      dropout, dropatt: rates of the feature and the attention dropout.
      position_dropout: "features", or "positions" as deq-seq has it; None takes the recipe's.
      dtype: of states and weights inside the solve, e.g. "bfloat16"; None is the parameters' own. Norms' statistics,
        attention probabilities, residuals, the softmax and the memory stay in float32.
      init: of tables and kernels, "normal" with `init_std` or "uniform" within `init_range`; projections are always normal,
        with `proj_init_std`.
    """

    recipe: str = "deq-lm"
    norm: str = "pre"
    n_tokens: int
    d_model: int
    n_head: int
    d_head: int
    d_inner: int
    n_layer: int = 1
    d_embed: int | None = None
    cutoffs: Sequence[int] = ()
    div_val: int = 1
    tie_weights: bool = True
    tie_projections: str = "shared"
    local_size: int | None = 0
    mem_len: int = 0
    dropout: float = 0.0
    dropatt: float = 0.0
    position_dropout: str | None = None
    dtype: str | None = None
    init: str = "normal"
    init_std: float = 0.01
    proj_init_std: float = 0.01
    init_range: float = 0.05

    def __post_init__(self):
        object.__setattr__(self, "cutoffs", tuple(self.cutoffs))
        for name, allowed in (
            ("recipe", ("deq-lm", "deq-seq")),
            ("norm", ("pre", "pre_bounded", "post")),
            ("tie_projections", ("shared", "upstream", "none")),
            ("position_dropout", (None, "features", "positions")),
            ("dtype", (None, "float32", "bfloat16")),
            ("init", ("normal", "uniform")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}.")
        for name in ("n_tokens", "d_model", "n_head", "d_head", "d_inner", "n_layer", "embed_width", "div_val"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('embed_width', 'd_embed')}={getattr(self, name)}: must be positive.")
        for name in ("dropout", "dropatt"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie between 0 and 1.")
        if self.mem_len < 0 or (self.local_size or 0) < 0:
            raise ValueError(f"mem_len={self.mem_len}, local_size={self.local_size}: must not be negative.")
        if self.recipe == "deq-seq" and self.n_layer != 1:
            raise ValueError(f"n_layer={self.n_layer}: the deq-seq cell is one block; several are the deq-lm recipe's.")
        if self.d_model % 2:
            raise ValueError(f"d_model={self.d_model}: must be even, positions are pairs of sine and cosine.")
        if self.n_head * self.d_head != self.d_model:
            raise ValueError(f"n_head*d_head = {self.n_head}*{self.d_head} must equal d_model={self.d_model}.")
        ends = [0, *self.cutoffs, self.n_tokens]
        if sorted(set(ends)) != ends or not all(isinstance(end, int) for end in ends):
            raise ValueError(
                f"cutoffs={tuple(self.cutoffs)}: must be integers that increase and lie below n_tokens={self.n_tokens}."
            )

    def initial(self, key: Key[Array, ""], shape: Sequence[int], dtype=float) -> Float[Array, "..."]:
        """First values of a table or a kernel."""
        if self.init == "uniform":
            return jax.random.uniform(key, shape, dtype, -self.init_range, self.init_range)
        return self.init_std * jax.random.normal(key, shape, dtype)

    def initial_projection(self, key: Key[Array, ""], width: int) -> Float[Array, "D E"]:
        """First values of a cluster's projection."""
        return self.proj_init_std * jax.random.normal(key, (self.d_model, width))

    @property
    def affine(self) -> bool:
        return self.recipe == "deq-lm"

    @property
    def interleaved(self) -> bool:
        """Queries, keys and values lie side by side within each head, rather than in thirds."""
        return self.recipe == "deq-lm"

    @property
    def attention_norm(self) -> bool:
        """A layer norm between the attention and its output projection."""
        return self.recipe == "deq-lm" and self.norm != "post"

    @property
    def embed_width(self) -> int:
        return self.d_model if self.d_embed is None else self.d_embed

    @property
    def window(self) -> int | None:
        return DEFAULT_WINDOW if self.local_size == 0 else self.local_size

    @property
    def position_mask_axis(self) -> str:
        return self.position_dropout or ("positions" if self.recipe == "deq-seq" else "features")

    @property
    def cluster_ends(self) -> list[int]:
        return [0, *self.cutoffs, self.n_tokens]

    @property
    def cluster_widths(self) -> list[int]:
        """Embedding width of every cluster."""
        return [max(self.embed_width // self.div_val**i, 1) for i in range(len(self.cutoffs) + 1)]

    @property
    def has_projections(self) -> bool:
        return self.div_val > 1 or self.embed_width != self.d_model


def warn_without_fixed_point(config: TransformerConfig, deq: DEQConfig) -> None:
    """Says why solvers and implicit gradients do not apply to the plain pre-norm cell."""
    implicit = deq.ift or deq.hook_ift
    if config.norm != "pre" or not (implicit or deq.f_solver in ("anderson", "broyden")):
        return
    assuming = "implicit gradients assume" if implicit else f"f_solver={deq.f_solver!r} assumes"
    warnings.warn(
        f"the pre-norm cell has no fixed point, and {assuming} one: every sub-layer reads z through a layer norm and "
        "adds to it, so f(z + c) = f(z) + c and I - df/dz is singular. The published recipe unrolls 12 steps "
        '(f_max_iter=0, grad=12). Use norm="post" or norm="pre_bounded" for a true equilibrium.',
        stacklevel=3,
    )
