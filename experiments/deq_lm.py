"""Word-level language modelling with the DEQ transformer.

    python -m experiments.deq_lm --config configs/pydoc.py
    python -m experiments.deq_lm --config configs/wt103.py --mode eval

Modes: train (and resume), eval (validation and test perplexity), generate (a continuation of `config.generate.prompt`),
export (the weights as a PyTorch state dict, to `config.export_path`). `config.init_from` takes another run or such a file.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deqjax.core import batched
from deqjax.data.pydoc import pydoc
from deqjax.data.text import EOS, OrderedBatches, TextCorpus, unigram_perplexity
from deqjax.data.wikitext import wikitext103
from deqjax.interop.torch_file import read_checkpoint, write_checkpoint
from deqjax.interop.transformer import export_transformer, load_transformer
from deqjax.models.transformer import DEQTransformer, Memory, TransformerConfig
from deqjax.models.transformer.adaptive import twice_held_projections
from deqjax.models.transformer.layout import layout
from deqjax.nn.config import DEQConfig
from deqjax.nn.variables import BatchVariable
from deqjax.training.console import say
from deqjax.training.errors import UserError
from deqjax.training.mesh import make_mesh, place_whole, process_share, replicated
from deqjax.training.metrics import Sums, vitals

CORPORA = {"wt103": wikitext103, "pydoc": pydoc, "text": TextCorpus.load}


class StreamingModel(nnx.Module):
    """The language model with the memory of its training streams, which is part of the training state."""

    def __init__(self, lm: DEQTransformer, batch_size: int):
        config = lm.config
        self.lm = lm
        memory = Memory.empty(batch_size, config.mem_len, config.d_model)
        self.z, self.u, self.length = (BatchVariable(x) for x in memory)

    def memory(self, reset) -> Memory:
        return Memory(self.z[...], self.u[...], self.length[...]).reset_where(reset)

    def remember(self, memory: Memory) -> None:
        self.z[...], self.u[...], self.length[...] = memory


class LanguageModelTask:
    """What the training loop needs to know about language modelling."""

    name = "deq_lm"
    modes = ("train", "eval", "generate", "export")
    free_to_change = ("data.dir", "generate", "export_path")

    def __init__(self, config, corpus: TextCorpus | None = None):
        """Reads the corpus that the config names, unless one is given.

        Raises:
          DataError: the corpus is missing or damaged.
          ValueError: a setting is wrong.
        """
        self.config = config
        if config.data.name not in CORPORA:
            raise ValueError(f"data.name={config.data.name!r}: must be one of {', '.join(CORPORA)}.")
        _check_settings(config)
        self.corpus = CORPORA[config.data.name](config.data.dir) if corpus is None else corpus
        self.deq = DEQConfig.from_config(config.deq)
        self.architecture = TransformerConfig(n_tokens=len(self.corpus.vocab), **config.model)
        self._evaluate_segment = jax.jit(self._segment, static_argnums=(0, 1))
        self._next_token = jax.jit(self._advance, static_argnums=(0, 1))
        self.items_per_step = ("tokens", config.data.batch_size * config.data.length)
        self.fingerprint = self.corpus.vocab.fingerprint()
        self.deq.eval_budget()
        for split in ("train", "valid", "test"):
            self.data(split)  # too short a split shows now, not at the first evaluation
        self.layout = layout(self.architecture)
        self.tied_updates = [[("lm", *path) for path in group] for group in twice_held_projections(self.architecture)]

    def model(self, rngs: nnx.Rngs) -> StreamingModel:
        return StreamingModel(DEQTransformer(self.architecture, self.deq, rngs), self.config.data.batch_size)

    def data(self, split: str) -> OrderedBatches:
        data = self.config.data
        if split == "train":
            varlen = self.config.seed if data.varlen else None
            shard, shards = process_share(make_mesh(self.config.get("mesh")))
            return OrderedBatches(
                self.corpus.train, data.batch_size, data.length, shard=shard, shards=shards, varlen_seed=varlen
            )
        return OrderedBatches(getattr(self.corpus, split), data.eval_batch_size, data.eval_length)

    def import_checkpoint(self, path: str, model: StreamingModel) -> None:
        """Published weights: a `.pth`, `.pt` or `.safetensors` state dict."""
        load_transformer(model.lm, read_checkpoint(path))

    def export(self, model: StreamingModel) -> str:
        """Writes the weights under the originals' names; `.safetensors`, or `.pth` with PyTorch installed."""
        # What is split over processes none of them can read.
        whole = jax.device_put(nnx.state(model.lm), replicated(make_mesh(self.config.get("mesh"))))
        nnx.update(model.lm, whole)
        state_dict = export_transformer(model.lm)
        write_checkpoint(self.config.export_path, state_dict)
        return f"Wrote {len(state_dict)} tensors to {self.config.export_path}."

    # Training --------------------------------------------------------------------------------------------------------

    def loss(self, model: StreamingModel, batch, key, step):
        """Mean weighted nll, plus the Jacobian term; the memory moves on to the next segment."""
        tokens, targets = batch["tokens"], batch["targets"]
        key_masks, key_probe, key_choice = jax.random.split(key, 3)
        lm, memory = model.lm, model.memory(batch["reset"])
        masks = lm.sample_masks(key_masks, *tokens.shape, memory.z.shape[1])
        injection = lm.encode(tokens, memory, masks, train=True)

        def run(unroll=None):
            start, options = self._start(memory, tokens), self.deq.training_options(step)
            out = lm.solve(injection, memory, train=True, z_init=start, unroll=unroll, solver_options=options)
            nll = jnp.mean(lm.nll(out.states, targets, masks))
            jacobian = self._jacobian_term(lm, out, key_probe, key_choice, step) if unroll is None else 0.0
            size = jnp.asarray(tokens.size, nll.dtype)
            metrics = {"loss": (nll * size, size), "jacobian": (jnp.asarray(jacobian, nll.dtype), jnp.ones_like(nll))}
            if self.deq.n_supervised > 1:
                # The loss is then a weighted sum over states; this is the last one's.
                last = jnp.sum(lm.nll(out.states[-1:], targets, masks._replace(output=masks.output[-1:])))
                metrics["nll_last"] = (last, size)
            return nll, jnp.asarray(jacobian, nll.dtype), out.memory, metrics | vitals(out.stats.sums())

        if self.config.pretrain_steps > 0:
            pretraining = step < self.config.pretrain_steps
            nll, jacobian, memory, metrics = jax.lax.cond(pretraining, lambda: run(self.config.pretrain_unroll), run)
        else:
            nll, jacobian, memory, metrics = run()
        model.remember(memory)

        return nll + jacobian, metrics

    def _start(self, memory: Memory, tokens):
        """Where a segment's solve begins: the last segment's states if so configured, else zeros."""
        return _last_segment(memory, tokens.shape[1]) if self.config.warm_start else None

    def _jacobian_term(self, lm, out, key_probe, key_choice, step):
        """Weighted Jacobian loss, present with the configured probability."""
        c, weight = self.deq, self.deq.jac_loss_weight
        if weight == 0 or c.jac_loss_freq == 0:
            return 0.0
        if every := c.jac_incremental:
            weight += 0.1 * (step // every - self.config.pretrain_steps // every)  # not in the pre-training phase
        chosen = jax.random.bernoulli(key_choice, c.jac_loss_freq)
        dtype = batched.accumulation_dtype(out.states[-1])
        return weight * jax.lax.cond(chosen, lambda: lm.jacobian_loss(out, key_probe), lambda: jnp.zeros((), dtype))

    # Evaluation ------------------------------------------------------------------------------------------------------

    def evaluate(self, model: StreamingModel, split: str = "valid", solver_options: dict | None = None) -> dict[str, float]:
        """Token-weighted mean nll over a split, with the memory carried through it; and how the solves went.

        Args:
          solver_options: see `DEQ`; another `f_limit` or `f_tol` compiles nothing anew.
        """
        batches, config, mesh = self.data(split), self.config.data, make_mesh(self.config.get("mesh"))
        graph, state = nnx.split(model.lm)
        memory = Memory.empty(config.eval_batch_size, config.eval_mem_len, self.architecture.d_model)
        memory = Memory(**place_whole(mesh, memory._asdict()))
        options, results = dict(solver_options or {}), []
        traced = {name: options.pop(name) for name in ("f_limit", "f_tol") if name in options}
        options = tuple(sorted(options.items()))
        for k in range(batches.n_segments):
            batch = place_whole(mesh, batches.batch(k))
            metrics, memory = self._evaluate_segment(graph, options, traced, state, memory, batch["tokens"], batch["targets"])
            results.append(metrics)
        # Fetched at the end, so that no segment waits for the host.
        sums = Sums()
        for metrics in results:
            sums.add(metrics)
        report = sums.means()
        return {"loss": report["loss"], "perplexity": float(np.exp(report["loss"]))} | report

    def _segment(self, graph, options, traced, state, memory: Memory, tokens, targets):
        """Metrics of one segment, and the memory for the next."""
        lm = nnx.merge(graph, state)
        out = lm(tokens, memory, z_init=self._start(memory, tokens), solver_options=dict(options) | traced)
        nll = jnp.sum(lm.nll(out.states, targets))
        metrics = {"loss": (nll, jnp.asarray(targets.size, nll.dtype)), **vitals(out.stats.sums())}
        if out.spectral_radius is not None:
            radius = out.spectral_radius
            metrics["forward/spectral_radius"] = (jnp.sum(radius), jnp.asarray(radius.size, radius.dtype))
        return metrics, memory.append(out.states[-1], out.injection.u, self.config.data.eval_mem_len)

    def report(self, model: StreamingModel) -> None:
        """Prints perplexities beside a unigram model's, and again with twice the solver steps."""
        corpus = self.corpus
        for split in ("valid", "test"):
            result = self.evaluate(model, split)
            unigram = unigram_perplexity(corpus.train, getattr(corpus, split), len(corpus.vocab))
            say(
                f"{split}: perplexity {result['perplexity']:.2f} (unigram model {unigram:.1f}) | "
                f"solver steps {result['forward/steps']:.1f} | relative residual {result['forward/rel']:.2e} | "
                f"segments converged {100 * result['forward/converged']:.1f}%"
            )
            if self.architecture.norm != "pre":
                # Twice the budget of evaluation, and no stopping before it is spent.
                budget = 2 * self.deq.eval_budget()
                twice = self.evaluate(model, split, {"eval_f_max_iter": budget, "f_tol": 0.0})
                say(f"{split}: perplexity {twice['perplexity']:.2f} after {budget} solver steps")

    # Generation ------------------------------------------------------------------------------------------------------

    def generate(self, model: StreamingModel) -> str:
        """Continues the configured prompt, one token at a time with the memory as context.

        At an equilibrium a remembered state is what solving again would give, so each new token is a solve of length
        one, started from its predecessor's state.
        """
        options, config = self.config.generate, self.architecture
        graph, state = nnx.split(model.lm)
        capacity = self.config.data.eval_mem_len
        if not capacity:
            raise UserError("config.data.eval_mem_len=0: a text is written word by word and needs a memory of those before.")
        prompt = self.corpus.vocab.encode(options.prompt.split())
        mesh = make_mesh(self.config.get("mesh"))
        memory = Memory(**place_whole(mesh, Memory.empty(1, capacity, config.d_model)._asdict()))
        cold = place_whole(mesh, {"z": jnp.zeros((1, 1, config.d_model))})["z"]
        z, tokens, key = cold, [0, *map(int, prompt)], jax.random.key(options.seed)
        for n in range(len(tokens) - 1 + options.n_tokens):
            # An unrolled cell has no equilibrium to start from.
            z = cold if config.norm == "pre" else z
            draw = options.temperature, jax.random.fold_in(key, n)
            token, z, memory = self._next_token(graph, options.top_k, state, memory, z, jnp.asarray(tokens[n]), *draw)
            if n + 1 >= len(tokens):
                tokens.append(int(token))
        return re.sub(f" ?{EOS} ?", "\n", self.corpus.vocab.decode(tokens[1:]))

    def _advance(self, graph, top_k, state, memory: Memory, z, token, temperature, key):
        """A token to follow `token`, the state of `token`, and the memory with that."""
        lm = nnx.merge(graph, state)
        out = lm(token[None, None], memory, z_init=z)
        logits = lm.log_prob(out.states[-1])[0, 0] / jnp.maximum(temperature, 1e-6)
        if top_k:
            floor = jax.lax.top_k(logits, min(top_k, logits.shape[0]))[0][-1]
            logits = jnp.where(logits >= floor, logits, -jnp.inf)
        memory = memory.append(out.states[-1], out.injection.u, self.config.data.eval_mem_len)
        return jax.random.categorical(key, logits), out.states[-1], memory


def _check_settings(config) -> None:
    """Raises ValueError for a number that cannot be."""
    data, generate = config.data, config.generate
    least = {f"data.{name}": (data[name], 1) for name in ("batch_size", "length", "eval_batch_size", "eval_length")}
    least |= {"data.eval_mem_len": (data.eval_mem_len, 0), "pretrain_steps": (config.pretrain_steps, 0)}
    least |= {"pretrain_unroll": (config.pretrain_unroll, 1)}
    least |= {f"generate.{name}": (generate[name], 0) for name in ("n_tokens", "top_k", "temperature")}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"{name}={value}: must be {minimum} or more.")
    if config.warm_start and not min(config.model.mem_len, data.eval_mem_len):
        raise ValueError("warm_start=True begins at the states in the memory: it needs model.mem_len and data.eval_mem_len.")


def _last_segment(memory: Memory, length: int):
    """The newest states of the memory as a start for the next segment; zeros where there are none."""
    rows, missing = memory.z[:, -length:], length - min(length, memory.z.shape[1])
    valid = jnp.arange(rows.shape[1]) >= rows.shape[1] - memory.length
    return jnp.pad(jnp.where(valid[None, :, None], rows, 0), ((0, 0), (missing, 0), (0, 0)))


def main(argv=None):
    from deqjax.cli import run

    return run(LanguageModelTask, argv)


if __name__ == "__main__":
    sys.exit(main())
