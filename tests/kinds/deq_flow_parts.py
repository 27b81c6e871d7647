"""Golden kinds of the parts of flow networks."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.interop.flow import aggregate_entries, canonical, cell_entries, encoder_entries
from deqjax.interop.state_dict import Entry, conv_entries, load_entries
from deqjax.models.flow import Aggregate, Attention, Cell, Encoder, Injection, convex_upsample, correlate, lookup
from deqjax.models.mdeq import resize_bilinear
from deqjax.nn.config import DEQConfig
from tests.golden import Case
from tests.kinds.deq_flow_reference import (
    architecture,
    close_buffers,
    close_statistics,
    compiled,
    first,
    gradients,
    in_float64,
    last,
    parameters,
    same,
    seeded,
)


def check_corr_lookup(case: Case, sub=None):
    fmap1, fmap2, weight = (seeded(case, name) for name in ("fmap1", "fmap2", "weight"))
    coords, h = last(case["in/coords"]), fmap1.shape[1]
    mask = (np.arange(h) >= 4)[None, :, None, None]
    volume = correlate(fmap1, fmap2, "volume")
    for level, array in enumerate(volume.levels):
        stride = 29 if level == 0 else 7
        got = np.asarray(array).reshape(-1, 1, *array.shape[3:])[::stride]
        same(got, case[f"out/pyramid_level{level}_rows_every{stride}"], f"level {level}")
    for form in ("volume", "on_demand"):

        def loss(fmap1, fmap2, coords, form=form):
            out = lookup(correlate(fmap1, fmap2, form), coords)
            return jnp.sum(out * weight * mask), out

        (value, out), grads = compiled(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(fmap1, fmap2, coords)
        same(first(out), case["out/corr"], f"{form}: correlations")
        same(value, case["loss"], f"{form}: loss")
        for name, got in zip(("fmap1", "fmap2", "coords"), grads, strict=True):
            same(first(got), case[f"grad/{name}"], f"{form}: gradient of {name}")


def check_bilinear_sampler(case: Case, sub=None):
    """Looking up in a map that is the reference's picture: correlations of a one-hot feature with its channels."""
    image, coords, weight = case["in/img"], jnp.asarray(case["in/coords"]), last(case["in/weight"])
    n, channels = image.shape[0], image.shape[1]

    def sample(image, coords, form):
        # The picture's channels one after the other, each as features of one number.
        maps = jnp.moveaxis(image, 1, 0)[..., None]
        ones = jnp.ones((n, *coords.shape[1:3], 1))
        centre = lambda fmap: lookup(correlate(jnp.broadcast_to(ones, (n, *coords.shape[1:3], 1)), fmap, form), coords)[..., 40]
        return jnp.stack([centre(maps[c]) for c in range(channels)], axis=-1)

    for form in ("volume", "on_demand"):

        def loss(image, coords, form=form):
            out = sample(image, coords, form)
            return jnp.sum(out * weight), out

        (value, out), grads = compiled(jax.value_and_grad(loss, (0, 1), has_aux=True))(jnp.asarray(image), coords)
        same(first(out), case["out/sampled"], f"{form}: samples")
        same(value, case["loss"], f"{form}: loss")
        same(grads[0], case["grad/img"], f"{form}: gradient of the picture")
        same(grads[1], case["grad/coords"], f"{form}: gradient of the coordinates")


def check_encoder(case: Case, sub=None):
    arrays = parameters(case)
    encoder = in_float64(lambda: Encoder(case.meta["output_dim"], case.meta["norm"], nnx.Rngs(0)))
    load_entries(encoder_entries(encoder), canonical(arrays))
    x, weight, batch = seeded(case, "x"), seeded(case, "weight"), case.meta["norm"] == "batch"
    same(first(compiled(lambda x: encoder(x))(x)), case["out/eval"], "evaluation")

    def loss(holder):
        out = holder.encoder(holder.x[...], train=batch)
        return jnp.sum(out * weight), (out, nnx.state(holder.encoder, nnx.BatchStat))

    holder = nnx.Module()
    holder.encoder, holder.x = encoder, nnx.Param(x)
    value, (out, statistics), gradient = gradients(holder, loss)
    if batch:
        same(first(out), case["out/train"], "training")
    same(value, case["loss"], "loss")
    same(first(gradient.x[...]), case["grad_input"], "gradient of the input")
    close_statistics(encoder_entries(gradient.encoder), case.meta["grad_stats"], case.group("grad"))
    nnx.update(encoder, statistics)
    close_buffers(encoder_entries(encoder), case)


def check_update_block(case: Case, sub=None):
    config, deq = architecture(case), DEQConfig()
    cell = in_float64(lambda: Cell(config, deq, nnx.Rngs(0)))
    load_entries(cell_entries(cell), parameters(case))
    h, corr, flow = (seeded(case, name) for name in ("h", "corr", "flow"))
    context = jax.nn.relu(seeded(case, "inp_before_relu"))
    attention = None
    if config.gma:
        seed, shape, scale = case.meta["seeded"]["attn_logits"]
        attention = jax.nn.softmax(jnp.asarray(scale * np.random.RandomState(seed).standard_normal(shape)), axis=-1)

    def loss(holder):
        inputs = {name: getattr(holder, name)[...] for name in ("h", "inp", "corr", "flow")}
        weights, contributions = holder.cell.effective(inputs["inp"], train=False)
        injection = Injection(None, contributions, attention, weights)
        h, update = holder.cell.update(inputs["h"], inputs["flow"], inputs["corr"], injection)
        value = jnp.sum(h * seeded(case, "weight_h")) + jnp.sum(update * seeded(case, "weight_dflow"))
        return value, (weights.motion(inputs["flow"], inputs["corr"]), h, update)

    holder = nnx.Module()
    holder.cell = cell
    for name, array in {"h": h, "inp": context, "corr": corr, "flow": flow}.items():
        setattr(holder, name, nnx.Param(array))
    value, outputs, gradient = gradients(holder, loss)
    for name, got in zip(("motion", "h", "dflow"), outputs, strict=True):
        same(first(got), case[f"out/{name}"], name)
    same(value, case["loss"], "loss")
    for name in ("h", "inp", "flow"):
        same(first(getattr(gradient, name)[...]), case[f"grad_in/{name}"], f"gradient of {name}")
    same(first(gradient.corr[...])[:, ::12], case["grad_in/corr_every12"], "gradient of the correlations")
    close_statistics(cell_entries(gradient.cell), case.meta["grad_stats"], case.group("grad"))


def check_convex_upsample(case: Case, sub=None):
    flow, mask, weight = last(case["in/flow"]), last(case["in/mask"]), seeded(case, "weight")

    def loss(flow, mask):
        up = convex_upsample(flow, mask)
        return jnp.sum(up * weight), up

    (value, up), (of_flow, of_mask) = compiled(jax.value_and_grad(loss, (0, 1), has_aux=True))(flow, mask)
    same(first(up), case["out/up"], "upsampled flow")
    same(value, case["loss"], "loss")
    same(first(of_flow), case["grad/flow"], "gradient of the flow")
    same(first(of_mask)[:, ::16], case["grad/mask_every16"], "gradient of the mask")
    size = tuple(8 * n for n in flow.shape[1:3])
    same(first(8 * resize_bilinear(flow, size, align_corners=True)), case["out/upflow8_bilinear"], "bilinear")


def check_gma(case: Case, sub=None):
    dim, heads, width = (case.meta[name] for name in ("dim", "heads", "dim_head"))
    holder = nnx.Module()
    holder.attn = in_float64(lambda: Attention(dim, heads, width, nnx.Rngs(0)))
    holder.aggregate = in_float64(lambda: Aggregate(dim, heads, width, nnx.Rngs(0)))

    def table(holder):
        of_aggregate = aggregate_entries(holder.aggregate)
        renamed = [Entry(f"aggregate.{entry.key}", entry.variable, entry.layout) for entry in of_aggregate]
        return conv_entries("attn.to_qk", holder.attn.to_qk) + renamed

    load_entries(table(holder), case.group("param"))
    weight = last(case["in/weight"])
    holder.context, holder.motion = nnx.Param(last(case["in/context"])), nnx.Param(last(case["in/motion"]))

    def loss(holder):
        attention = holder.attn(holder.context[...])
        out = holder.aggregate.effective()(holder.motion[...], attention)
        return jnp.sum(out * weight), (attention, out)

    value, (attention, out), gradient = gradients(holder, loss)
    same(attention, case["out/attn"], "attention")
    same(first(out), case["out/aggregated"], "aggregated")
    same(value, case["loss"], "loss")
    for name in ("context", "motion"):
        same(first(getattr(gradient, name)[...]), case[f"grad_in/{name}"], f"gradient of {name}")
    for entry in table(gradient):
        same(entry.layout.export(np.asarray(entry.variable[...])), case[f"grad/{entry.key}"], f"gradient of {entry.key}")


KINDS = {
    "corr_lookup": check_corr_lookup,
    "bilinear_sampler": check_bilinear_sampler,
    "encoder": check_encoder,
    "update_block": check_update_block,
    "convex_upsample": check_convex_upsample,
    "gma": check_gma,
}
