"""Optimisers, numerically those of PyTorch."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from deqjax.core.naming import leaf_path
from deqjax.optim.schedules import check_name, learning_rate
from deqjax.training.errors import UserError

_AT_LEAST_0 = ("learning_rate", "weight_decay", "clip", "clip_value", "eps", "warmup_steps", "decay_factor", "lr_min")
OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop", "adagrad")


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales the gradient by min(1, max_norm / (norm + 1e-6)), PyTorch's formula."""

    def update(updates, state, params=None):
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def leave_untouched(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Leaves a parameter alone whose gradient is zero in every entry: its value, its moments and its clock.

    What PyTorch's optimisers do to a parameter that took no part in a step (a cluster of the vocabulary without a token in
    the batch): its gradient is None there. Every parameter gets a state of its own, so that each has its own clock.

    Args:
      optimizer: one that treats parameters independently of each other.
    """

    def init(params):
        return jax.tree.map(optimizer.init, params)

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        params = [None] * len(leaves) if params is None else structure.flatten_up_to(params)
        results = []
        for gradient, own, param in zip(leaves, structure.flatten_up_to(state), params, strict=True):
            touched = jnp.any(gradient != 0)
            moved, after = optimizer.update(gradient, own, param)
            keep = lambda new, old, touched=touched: jnp.where(touched, new, old)  # noqa: E731
            results.append((jnp.where(touched, moved, 0), jax.tree.map(keep, after, own)))
        moved, after = zip(*results, strict=True)
        return structure.unflatten(moved), structure.unflatten(after)

    return optax.GradientTransformation(init, update)


def tie_updates(groups: Sequence[Sequence[tuple[str, ...]]]) -> optax.GradientTransformation:
    """Gives all leaves of a group the sum of their updates.

    What an optimiser does to one tensor that it holds under several names, as the original does to tied projections.
    Comes after the optimiser proper.

    Args:
      groups: paths of leaves, e.g. `[(("embed", "proj_0"), ("head", "proj_0"))]`.

    Raises:
      ValueError: no parameter has such a path.
    """

    def update(updates, state, params=None):
        by_path = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]}
        totals = {}
        for group in groups:
            if missing := [path for path in group if tuple(path) not in by_path]:
                raise ValueError(f"no parameter {'/'.join(missing[0])} to tie; there are {', '.join(map('/'.join, by_path))}.")
            totals |= dict.fromkeys(map(tuple, group), sum(by_path[tuple(path)] for path in group))
        return jax.tree_util.tree_map_with_path(lambda path, leaf: totals.get(leaf_path(path), leaf), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def build_optimizer(config: Mapping, tied: Sequence[Sequence[tuple[str, ...]]] = ()) -> optax.GradientTransformation:
    """The optimiser of `config.optimizer`.

    Args:
      config: name, learning_rate (see `learning_rate` for its schedule); optionally b1, b2, eps, decay (rmsprop's alpha),
        momentum, nesterov, weight_decay (part of the gradient, as in PyTorch; adamw alone decouples it), clip (of the
        gradient's norm; 0: none) and clip_value (of every entry of the gradient; 0: none).
      tied: see `tie_updates`.

    Raises:
      UserError: an unknown name, or a number that cannot be.
    """
    name = config.get("name", "adam")
    check_name("name", name, OPTIMIZERS)
    if config.get("learning_rate") is None:
        raise UserError("The config lacks config.optimizer.learning_rate.")
    for setting in _AT_LEAST_0:
        # A negative bound would turn the gradient round, NaN would get into the weights.
        if not 0 <= (value := config.get(setting) or 0) < math.inf:
            raise UserError(f"config.optimizer.{setting}={value}: must be a number, 0 or more.")
    for setting in ("b1", "b2", "decay", "momentum"):
        if not 0 <= (value := config.get(setting) or 0) < 1:
            raise UserError(f"config.optimizer.{setting}={value}: must be from 0 to less than 1.")

    # What has no state has a place all the same: turning it on or off in a run leaves that of the others where it is.
    def given(setting, make):
        return make(float(config[setting])) if config.get(setting) else optax.identity()

    scale, momentum = optax.identity(), optax.identity()
    if name in ("adam", "adamw"):
        scale = optax.scale_by_adam(config.get("b1", 0.9), config.get("b2", 0.999), config.get("eps", 1e-8))
    elif name == "rmsprop":
        scale = optax.scale_by_rms(config.get("decay", 0.99), config.get("eps", 1e-8), eps_in_sqrt=False)
    elif name == "adagrad":
        scale = _scale_by_adagrad(config.get("eps", 1e-10))
    if name in ("sgd", "rmsprop"):
        momentum = given("momentum", lambda decay: optax.trace(decay, nesterov=config.get("nesterov", False)))
    decay = given("weight_decay", optax.add_decayed_weights)
    coupled, decoupled = (optax.identity(), decay) if name == "adamw" else (decay, optax.identity())
    return optax.chain(
        given("clip", clip_by_global_norm),
        given("clip_value", optax.clip),
        leave_untouched(optax.chain(coupled, scale, momentum, decoupled)),
        optax.scale_by_learning_rate(learning_rate(config)),
        tie_updates(tied),
    )


def _scale_by_adagrad(eps: float) -> optax.GradientTransformation:
    """g / (sqrt(sum of g^2) + eps); optax has eps under the root."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, sums, params=None):
        sums = jax.tree.map(lambda s, g: s + jnp.square(g), sums, updates)
        return jax.tree.map(lambda s, g: g / (jnp.sqrt(s) + eps), sums, updates), sums

    return optax.GradientTransformation(init, update)
