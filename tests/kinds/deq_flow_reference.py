"""What the golden kinds of the flow networks share: the references' parameters, layout and statistics."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.interop.flow import canonical, export_flow, load_flow
from deqjax.interop.state_dict import Entry
from deqjax.models.flow import DEQFlow, FlowConfig
from deqjax.nn.config import DEQConfig
from tests.golden import Case, close

# Much is compiled here, and little computed.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Some references were stored in float32.
HALF = {np.dtype("float64"): 1e-9, np.dtype("float32"): 1e-6}


def last(x):
    """Channels last, from the reference's layout."""
    return jnp.asarray(np.moveaxis(np.asarray(x), 1, -1))


def first(x):
    """... and back."""
    return np.moveaxis(np.asarray(x), -1, 1)


def same(got, want, what, rtol=None):
    close(got, want, rtol=HALF[np.asarray(want).dtype] if rtol is None else rtol, what=what)


# Parameters of the references ----------------------------------------------------------------------------------------


def parameters(case: Case) -> dict[str, np.ndarray]:
    """Regenerated from the case's rules, and compared with its check sums."""
    arrays = case.group("param")
    rules = case.meta.get("param_rules", ())
    for rule in sorted(rules, key=lambda rule: ("randn" not in rule["kind"], rule["kind"] == "alias")):
        arrays[rule["key"]] = _by_rule(rule, arrays)
        if "check" in rule:
            x = arrays[rule["key"]]
            np.testing.assert_allclose([x.sum(), np.abs(x).sum(), x.flat[0], x.flat[-1]], rule["check"], rtol=1e-9, atol=1e-9)
    return arrays


def _by_rule(rule, arrays):
    if rule["kind"] == "alias":
        return arrays[rule["src"]]
    x = np.random.RandomState(rule["seed"]).standard_normal(rule["shape"])
    x = np.abs(x) if rule["kind"] == "absrandn" else x
    x = rule["offset"] + rule["scale"] * x
    if rule["kind"] == "rownorm":
        source = arrays[rule["src"]]
        x = np.sqrt(np.sum(source**2, axis=tuple(range(1, source.ndim)))).reshape(rule["shape"]) * x
    x[rule.get("zero_rows", [])] = 0
    for index, value in rule.get("set", ()):
        x[tuple(index)] = value
    return x


def seeded(case: Case, name: str):
    seed, shape, scale = case.meta["seeded"][name]
    return last(scale * np.random.RandomState(seed).standard_normal(shape))


def options(case: Case) -> dict:
    """The command line of the reference."""
    words, found = case.meta["config"].split(), {}
    for word, value in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word[2:]] = True if value.startswith("--") else value
    return found


def architecture(case: Case) -> FlowConfig:
    flags = options(case)
    size = next((size for size in ("tiny", "large", "huge", "gigantic") if size in flags), "base")
    return FlowConfig(size=size, **{name: name in flags for name in ("gma", "all_grad", "old_version")})


def equilibrium(case: Case) -> DEQConfig:
    numbers = {"f_max_iter": int, "n_states": int, "grad": int, "b_max_iter": int, "eval_f_max_iter": int}
    numbers |= dict.fromkeys(("f_tol", "b_tol", "eval_factor", "tau", "gamma"), float)
    settings = {name: numbers.get(name, lambda x: x)(value) for name, value in options(case).items()}
    known = DEQConfig.__dataclass_fields__
    return DEQConfig.from_config({name: value for name, value in settings.items() if name in known} | {"preset": "torchdeq"})


def in_float64(make):
    """What `make` makes, with zeros in float64."""
    graph, state = nnx.split(nnx.eval_shape(make))
    zeros = lambda x: jnp.zeros(x.shape, jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
    return nnx.merge(graph, jax.tree.map(zeros, state))


def build(case: Case) -> DEQFlow:
    """A float64 model with the case's parameters, which survive a round trip through it."""
    config, deq, arrays = architecture(case), equilibrium(case), parameters(case)
    model = in_float64(lambda: DEQFlow(config, deq, nnx.Rngs(0)))
    load_flow(model, {f"module.{key}": value for key, value in arrays.items()})
    exported = canonical(export_flow(model))
    assert exported.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=f"{key} after the round trip")
    return model


def gradients(module, loss):
    """Value, auxiliary output, and the module with gradients in the places of its parameters."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    of_params = lambda params: loss(nnx.merge(graph, params, rest, copy=True))
    (value, aux), gradient = compiled(jax.value_and_grad(of_params, has_aux=True))(params)
    return value, aux, nnx.merge(graph, gradient, rest)


def close_statistics(table: list[Entry], stats: dict, stored: dict, rtol=1e-6, what="gradient"):
    """Norm, sum, projection and a sample of every array."""
    compared = set()
    for entry in table:
        if entry.key not in stats:
            continue
        want = stats[entry.key]
        g = np.asarray(entry.layout.export(np.asarray(entry.variable[...], np.float64))).reshape(-1)
        compared.add(entry.key)
        if want.get("none") or want.get("zero_up_to_rounding"):
            assert np.max(np.abs(g)) < 1e-9, f"{what} of {entry.key} should be zero"
            continue
        seed = (12345 + int(hashlib.md5(entry.key.encode()).hexdigest()[:6], 16)) % 2**31
        direction = np.random.RandomState(seed).standard_normal(g.size)
        got = [np.linalg.norm(g), g.sum(), g @ direction]
        scale = [want["l2"], np.sqrt(g.size) * want["l2"], np.sqrt(g.size) * want["l2"]]
        for name, value, size in zip(("l2", "sum", "proj"), got, scale, strict=True):
            assert abs(value - want[name]) <= rtol * size, f"{name} of the {what} of {entry.key}: {value}, not {want[name]}"
        if entry.key in stored:
            sample = np.asarray(stored[entry.key]).reshape(-1)
            scale = want["l2"] / np.sqrt(g.size)
            chosen = g if want.get("full") else g[:: want["stride"]]
            close(chosen[: sample.size], sample, atol=10 * rtol * max(scale, np.abs(sample).max()), what=entry.key)
    assert compared == set(stats)


def close_buffers(table, case: Case):
    """Running statistics after the forward pass."""
    expected = {key: value for key, value in case.group("out/bn_after").items() if "downsample" not in key}
    found = {entry.key: entry.variable for entry in table}
    for key, value in expected.items():
        same(found[key][...], value, f"{key} after training")
