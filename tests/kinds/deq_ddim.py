"""Golden kinds of the diffusion model. References are laid out `[.., C, H, W]`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.interop.ddim import entries, export_ddim, load_ddim
from deqjax.models.ddim import Chain, UNet, UNetConfig, betas, select_timesteps, signal_rates
from deqjax.models.ddim.unet import sinusoid
from tests.golden import Case, close

# The references round the angles of the sinusoid to float32 with another library's functions.
SINUSOID = 1e-6


def last(x):
    """Channels moved to the end."""
    return jnp.asarray(np.moveaxis(np.asarray(x, np.float64), -3, -1))


def first(x):
    """Channels moved to where the references have them."""
    return jnp.moveaxis(x, -1, -3)


def weights_by_rule(case: Case, like: dict) -> dict:
    """The parameters that the case's rule gives, checked against its sums."""
    state_dict = {}
    for i, key in enumerate(sorted(like)):
        r = np.random.RandomState(case.meta["weight_seed"] + i).randn(*like[key].shape)
        module, kind = key.split(".")[-2:]
        if r.ndim > 1:
            w = r / np.sqrt(np.prod(r.shape[1:])) * (case.meta["out_gain"] if key == "conv_out.weight" else 1)
        else:
            w = 1 + 0.1 * r if module.startswith("norm") and kind == "weight" else 0.05 * r
        state_dict[key] = w
    assert list(state_dict) == case.meta["keys"]
    close([w.sum() for w in state_dict.values()], case["paramcheck/sum"], rtol=1e-12, what="sums of the weights")
    return state_dict


def unet_of(case: Case) -> UNet:
    """A float64 U-Net with the case's parameters, and a round trip of them."""
    c, data = case.meta["config"]["model"], case.meta["config"]["data"]
    config = UNetConfig(
        image_size=data["image_size"],
        image_channels=c["in_channels"],
        width=c["ch"],
        multipliers=tuple(c["ch_mult"]),
        n_blocks=c["num_res_blocks"],
        attention=tuple(c["attn_resolutions"]),
        dropout=c["dropout"],
        resample_conv=c["resamp_with_conv"],
    )
    graph, state = nnx.split(UNet(config, nnx.Rngs(0)))
    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64), state))
    params = {k: np.asarray(v, np.float64) for k, v in case.group("param").items()}
    params = params or weights_by_rule(case, export_ddim(model))
    load_ddim(model, params)
    exported = export_ddim(model)
    assert exported.keys() == params.keys()
    for key, value in params.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=f"{key} after the round trip")
    return model


def rates_of(case: Case) -> np.ndarray:
    c = case.meta["config"]["diffusion"]
    return signal_rates(betas(c["beta_schedule"], c["num_diffusion_timesteps"], c["beta_start"], c["beta_end"]))


def differentiate(model: UNet, loss):
    """Value and gradient with respect to the parameters of a function of the model."""
    graph, params = nnx.split(model)
    value, gradient = jax.jit(jax.value_and_grad(lambda params: loss(nnx.merge(graph, params))))(params)
    return value, nnx.merge(graph, gradient)


def check_gradients(with_gradients: UNet, case: Case, rtol):
    """Some are zero up to rounding, so all are held to digits of the norm of the whole."""
    norms = case.group("gradnorm")
    assert norms.keys() == {entry.key for entry in entries(with_gradients)}
    whole = float(np.sqrt(sum(norm**2 for norm in norms.values())))
    for entry in entries(with_gradients):
        got = np.ravel(entry.layout.export(np.asarray(entry.variable[...])))
        close(np.linalg.norm(got), norms[entry.key], atol=rtol * whole, what=f"norm of the gradient of {entry.key}")
        name = f"grad/{entry.key}" if f"grad/{entry.key}" in case else f"gradsample/{entry.key}"
        if name.startswith("gradsample"):
            got = got[np.linspace(0, got.size - 1, 48).astype(np.int64)]
        close(got, case[name].ravel(), atol=rtol * whole, what=f"gradient of {entry.key}")


# Schedules -----------------------------------------------------------------------------------------------------------


def check_schedules(case: Case, sub=None):
    meta = case.meta
    n, start, end = meta["num_diffusion_timesteps"], meta["beta_start"], meta["beta_end"]
    for name in ("linear", "quad", "const", "jsd", "sigmoid", "geometric"):
        close(betas(name, n, start, end), case[f"out/betas_{name}"], rtol=1e-12, what=name)
        close(signal_rates(betas(name, n, start, end)), case[f"out/alphas_cumprod_{name}"], rtol=1e-12, what=name)
    np.testing.assert_array_equal(select_timesteps("custom", 1, n), case["out/seq_custom"])
    for selection in ("uniform", "quad"):
        for T in meta["Ts"]:
            got = select_timesteps(selection, T, n, dedupe=False)
            np.testing.assert_array_equal(got, case[f"out/seq_{selection}_{T}"])
            np.testing.assert_array_equal(select_timesteps(selection, T, n), np.unique(got))
    rates = signal_rates(betas("linear", n, start, end))
    for name in sorted({a.rsplit("_t", 1)[0] for a in case.arrays if a.startswith("out/coef_") and a.endswith("_t")}):
        t = case[f"{name}_t"]
        chain = Chain.create(rates, t[::-1])
        np.testing.assert_array_equal(chain.t, t)
        close(chain.a, case[f"{name}_at"], rtol=1e-12, what=name)
        close(chain.b, case[f"{name}_at_next"], rtol=1e-12, what=name)
        close(np.sqrt(chain.b / chain.a[0]), case[f"{name}_alpha_ratio"], rtol=1e-12, what=name)
        close(np.sqrt(chain.b), case[f"{name}_et_prevsum_coeff"], rtol=1e-12, what=name)
        close(chain.push / np.sqrt(chain.b), case[f"{name}_et_coeff"], rtol=1e-10, what=name)
        for eta in (0.2, 0.5, 1.0):
            chain = Chain.create(rates, t[::-1], eta)
            close(chain.push / np.sqrt(chain.b), case[f"{name}_eta{eta}_et_coeff"], rtol=1e-10, what=f"{name} {eta}")
            close(chain.sigma / np.sqrt(chain.b), case[f"{name}_eta{eta}_noise_coeff"], rtol=1e-10, what=f"{name} {eta}")
    for width in (32, 128):
        close(sinusoid(jnp.asarray(case["in/t_embed"]), width), case[f"out/temb_dim{width}"], rtol=2e-7, what="sinusoid")


# The network ---------------------------------------------------------------------------------------------------------


def check_unet(case: Case, sub=None):
    model = unet_of(case)
    t = jnp.asarray(case["in/t"])
    close(first(jax.jit(model)(last(case["in/x"]), t)), case["out/eps"], rtol=SINUSOID, what="predicted noise")
    embedding = model.embed(t)
    taps = {"conv_in": model.conv_in(last(case["in/x"]))}
    taps["down.0.block.0"] = model.down[0].block[0](taps["conv_in"], embedding[0], None)
    taps["down.0.downsample"] = model.down[0].downsample(taps["down.0.block.0"])
    for name, value in taps.items():
        close(first(value), case[f"out/tap/{name}"], rtol=1e-6, what=name)

    a = jnp.asarray(rates_of(case)[case["in/t"]])[:, None, None, None]
    x0, e = last(case["in/x0"]), last(case["in/e"])

    def loss(model):
        return jnp.mean(jnp.sum(jnp.square(e - model(jnp.sqrt(a) * x0 + jnp.sqrt(1 - a) * e, t)), axis=(1, 2, 3)))

    value, gradient = differentiate(model, loss)
    close(value, case["loss"], rtol=SINUSOID, what="loss")
    check_gradients(gradient, case, rtol=SINUSOID)


KINDS = {
    "schedules": check_schedules,
    "unet": check_unet,
}
