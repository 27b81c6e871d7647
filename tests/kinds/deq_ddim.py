"""Golden kinds of the diffusion model. References are laid out `[.., C, H, W]`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deqjax import Implicit, Phantom, Picard, Status, TriangularAnderson, solve
from deqjax.core.hoist import hoist
from deqjax.interop.ddim import entries, export_ddim, load_ddim
from deqjax.models.ddim import (
    Chain,
    JointSystem,
    UNet,
    UNetConfig,
    attach,
    betas,
    chain_denoiser,
    encode,
    inversion,
    one_step_gradient,
    sample_ddim,
    sample_ddpm,
    select_timesteps,
    sequential_gradient,
    signal_rates,
    solve_joint,
)
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


# Sampling ------------------------------------------------------------------------------------------------------------


def chain_of(case: Case) -> Chain:
    timesteps = select_timesteps(case.meta["skip_type"], case.meta["T"], dedupe=False)
    np.testing.assert_array_equal(timesteps, case["in/seq"])
    return Chain.create(rates_of(case), timesteps, case.meta.get("eta", 0.0))


def joint(x, B):
    """The references' joint state, `[B T, C, H, W]`, in ours."""
    return last(x.reshape(B, -1, *x.shape[1:]))


def check_joint_sampling(case: Case, sub=None):
    model, chain = unet_of(case), chain_of(case)
    B, T = case.meta["B"], len(chain)
    denoise, x_T = chain_denoiser(model, chain), last(case["in/x_T"])
    noise = joint(case["in/noise"], B) if "in/noise" in case else None
    expected = last(case["out/z_star"])

    sampled = jax.jit(lambda x: sample_ddim(denoise, chain, x, noise))(x_T)
    close(first(sampled.trajectory), case["out/seq_traj"], rtol=SINUSOID, what="sequential trajectory")
    close(first(sampled.predictions), case["out/x0_preds"], rtol=SINUSOID, what="predicted images")
    close(first(sampled.image), case["out/sample"], rtol=SINUSOID, what="sample")

    system = JointSystem(denoise, chain)
    f = jax.jit(system.map(x_T, noise))
    once = f(joint(case["in/z_probe"], B))
    close(first(once), case["out/f_once"].reshape(B, T, *case["out/f_once"].shape[1:]), rtol=SINUSOID, what="f")
    z, errors, norms = jnp.repeat(x_T[:, None], T, axis=1), [], []
    for i in range(T):
        image = f(z)
        norms.append(jnp.linalg.norm(image - z))
        z = image
        errors.append(jnp.max(jnp.abs(z - sampled.trajectory), axis=(2, 3, 4)))
        if f"out/fp_iterate_{i + 1}" in case:
            close(z, joint(case[f"out/fp_iterate_{i + 1}"], B), rtol=SINUSOID, what=f"iterate {i + 1}")
        # One more slot is exact after each evaluation.
        assert jnp.max(errors[-1][:, : i + 1]) < 1e-11
    close(jnp.stack(errors), case["out/fp_err_vs_seq"], rtol=SINUSOID, what="errors of the plain iteration")
    close(norms, case["out/fp_residual_norm"], rtol=SINUSOID, what="residuals of the plain iteration")
    close(z, expected, rtol=SINUSOID, what="fixed point")

    solver = TriangularAnderson(max_steps=T, tol=1e-13)
    solution = jax.jit(lambda x: solve_joint(system, x, noise, solver=solver))(x_T)
    assert np.all(solution.stats.status == Status.CONVERGED) and int(solution.calls) <= T
    close(solution.trajectory, z, rtol=1e-11, what="accelerated")


def check_ddpm(case: Case, sub=None):
    model, chain = unet_of(case), chain_of(case)
    denoise = chain_denoiser(model, chain)
    sampled = jax.jit(lambda x, z: sample_ddpm(denoise, chain, x, z))(last(case["in/x_T"]), last(case["in/noise"]))
    close(first(sampled.trajectory), case["out/traj"], rtol=SINUSOID, what="trajectory")
    close(first(sampled.predictions), case["out/x0_preds"], rtol=SINUSOID, what="predicted images")


def check_trained(case: Case, sub=None):
    """A trained network: how fast the plain iteration goes, and the original's Anderson, evaluation by evaluation."""
    model, x_T, rates = unet_of(case), last(case["in/x_T"]), rates_of(case)
    for tag in case.meta["tags"]:
        selection, T = ("uniform", 50) if tag.startswith("uniform") else ("quad", 100)
        chain = Chain.create(rates, select_timesteps(selection, T, dedupe=False))
        denoise = chain_denoiser(model, chain)
        system = JointSystem(denoise, chain)
        sampled = jax.jit(lambda x, d=denoise, c=chain: sample_ddim(d, c, x))(x_T)
        close(first(sampled.image), case[f"out/{tag}/seq_sample"], rtol=SINUSOID, what=f"{tag}: sample")
        close(first(sampled.trajectory[0]), case[f"out/{tag}/seq_traj_f32"], rtol=SINUSOID, what=f"{tag}: trajectory")

        @jax.jit
        def plain(z, f=system.map(x_T), exact=sampled.trajectory):
            def step(z, _):
                image = f(z)
                difference = jnp.abs(image - exact)
                relative = jnp.linalg.norm(image - z) / jnp.linalg.norm(image)
                return image, jnp.stack([relative, jnp.max(difference[:, -1]), jnp.max(difference)])

            return jax.lax.scan(step, z, length=45)[1]

        z = jnp.repeat(x_T[:, None], T, axis=1)
        trace = plain(z)
        close(trace, case[f"out/{tag}/fp_trace"], rtol=SINUSOID, what=f"{tag}: plain iteration")
        below = lambda tol, trace=trace: int(np.argmax(np.asarray(trace[:, 1]) < tol)) + 1
        for tol in ("1e-3", "1e-6"):
            assert below(float(tol)) == case.meta["results"][f"{tag}_fp_iters_to_{tol}"]

        for memory in (3,) if tag.startswith("uniform") else (5,):
            want = case[f"out/{tag}/upstream_anderson_m{memory}_residuals"]
            original = {"weights": "slot", "ridge": 1e-3, "ridge_mode": "absolute", "memory": memory}
            solver = TriangularAnderson(max_steps=15, return_final=True, **original)
            stats = jax.jit(lambda z, s=solver, f=system.map(x_T): solve(hoist(f, z), z, s))(z).stats
            # It logs from its third evaluation on, and stops when it is satisfied.
            got = np.stack([stats.abs_trace[0], stats.rel_trace[0]], axis=1)[2 : 2 + len(want)]
            close(got, want, rtol=1e-4, what=f"{tag}: the original's Anderson, m={memory}")


# Inversion -----------------------------------------------------------------------------------------------------------


def check_inversion(case: Case, sub=None):
    model, chain = unet_of(case), chain_of(case)
    x_T, target, T = last(case["in/x_T"]), last(case["in/x_target"]), len(chain)
    denoise = chain_denoiser(model, chain)
    system = JointSystem(denoise, chain)

    probe = last(case["in/z_probe"])[None]
    # The reference's map has the latent as the argument that the probe begins with.
    once = jax.jit(lambda z: system.map_with_latent(x_T)(z))(probe)
    close(first(once[0]), case["out/f_once"], rtol=SINUSOID, what="f")
    z = jax.jit(lambda x: solve_joint(system, x, solver=Picard(max_steps=T, tol=0.0)))(x_T).trajectory
    close(first(jnp.concatenate([x_T[:, None], z], axis=1)[0]), case["out/z_star"], rtol=SINUSOID, what="fixed point")
    close(first(z[:, -1]), case["out/seq_final"], rtol=SINUSOID, what="image")
    close(jnp.sum(jnp.square(z[:, -1] - target)), case["loss"], rtol=SINUSOID, what="loss")
    encoded = jax.jit(lambda x: encode(denoise, chain, x))(target)
    close(first(encoded[0]), case["out/encode_traj"], rtol=SINUSOID, what="encoding")

    plain = Implicit(solver=Picard(max_steps=T + 1, tol=1e-14))
    graph, params = nnx.split(model)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(params, x_T):
        system = JointSystem(chain_denoiser(nnx.merge(graph, params), chain), chain)
        return jnp.sum(jnp.square(attach(system, x_T, None, z, plain)[:, -1] - target))

    value, (of_params, of_latent) = loss(params, x_T)
    close(value, case["loss"], rtol=SINUSOID, what="loss")
    check_gradients(nnx.merge(graph, of_params), case, rtol=SINUSOID)
    close(first(of_latent[0]), case["grad_ift/x_T"], rtol=SINUSOID, what="implicit gradient")
    sequential = jax.jit(lambda x: sequential_gradient(system, x, target, None))(x_T)[1]
    close(first(sequential[0]), case["grad_bptt/x_T"], rtol=SINUSOID, what="backpropagation")
    close(sequential, of_latent, rtol=1e-11, what="backpropagation and implicit gradient")

    closed = first(one_step_gradient(system, z[:, -1], target)[0])

    @functools.partial(jax.jit, static_argnums=(1, 2))
    @jax.value_and_grad
    def phantom(x_T, damping, steps):
        image = attach(system, x_T, None, z, Phantom(steps=steps, damping=damping))[:, -1]
        return jnp.sum(jnp.square(image - target))

    for steps, damping in ((1, 0.1), (1, 1.0), (3, 0.5)):
        want = case[f"grad_phantom/g{steps}_tau{damping}/x_T"]
        value, gradient = phantom(x_T, damping, steps)
        close(value, case[f"out/phantom_loss_g{steps}_tau{damping}"], rtol=SINUSOID, what="loss of the phantom step")
        close(first(gradient[0]), want, rtol=SINUSOID, what=f"phantom gradient, {steps} steps of {damping}")
        if steps == 1:
            close(damping * closed, want, rtol=SINUSOID, what="closed form")

    settings = {"optimizer": optax.adam(0.005), "solver": Picard(max_steps=T, tol=0.0)}
    init, update = inversion(system, target, **settings)
    state, update = init(encoded[:, -1]), jax.jit(update)
    for want_loss, want in zip(case["out/adam_fp_losses"], case["out/adam_fp_latents"], strict=True):
        state = update(state)
        close(state.loss, want_loss[None], rtol=SINUSOID, what="loss on the way")
        close(first(state.x_T[0]), want, rtol=SINUSOID, what="latent on the way")


KINDS = {
    "schedules": check_schedules,
    "unet": check_unet,
    "joint_sampling": check_joint_sampling,
    "trained_joint_sampling": check_trained,
    "ddpm_noisy": check_ddpm,
    "inversion": check_inversion,
}
