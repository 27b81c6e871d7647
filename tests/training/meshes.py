"""A task on many devices computes what it does on one: a training step, and a run that moves between meshes."""

import jax
import numpy as np

from deqjax.training import loop
from deqjax.training.mesh import make_mesh, place_batch
from deqjax.training.state import named_leaves
from deqjax.training.step import Program, prepare, step_function
from tests.training.collectives import collectives
from tests.training.runs import lines

SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (4, 1, 2), (2, 2, 2)]


def mesh_of(shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return make_mesh(dict(zip(("data", "fsdp", "model"), shape, strict=True)), devices)


def compiled_step(task, mesh) -> tuple[Program, jax.stages.Compiled, tuple]:
    """The task's program, its compiled step, and state and batch to call it with."""
    batch = place_batch(mesh, task.data("train").batch(0))
    program = prepare(task, task.config, mesh, batch)
    # The same weights everywhere: computed on a mesh, initial scales differ in their last bit.
    one = mesh_of((1, 1, 1))
    state = prepare(task, task.config, one, place_batch(one, task.data("train").batch(0))).init()
    state = jax.tree.map(jax.device_put, state, program.shardings)
    update = jax.jit(step_function(task, task.config, program, 1), out_shardings=(program.shardings, None, None))
    return program, update.lower(state, batch).compile(), (state, batch)


def assert_devices_share_out_a_batch(step) -> None:
    """They sum their gradients, all at once, and within a solve tell each other one number per check.

    Not where a loop over recorded steps is differentiated: there each step's share of the gradient is summed on a CPU.
    """
    found = collectives(step)
    assert not [c for c in found if "while" in c.scope and c.entries > 1]
    large = [c for c in found if c.entries > 100]
    assert [c.kind for c in large] == ["all-reduce"], large


def loss_and_gradient(task, mesh) -> dict[tuple, np.ndarray]:
    """The metrics of a step, its gradient, and the model's variables: the config must have sgd with momentum."""
    _, step, arguments = compiled_step(task, mesh)
    return _outcome(step, *arguments)


def _outcome(step, state, batch):
    after, sums, report = step(state, batch)
    # After one step the momentum is the gradient.
    everything = {"sums": sums, "norm": report["grad_norm"], "gradient": after.opt, "variables": after.variables}
    arrays = named_leaves(everything)
    return {path: np.asarray(x) for path, x in arrays.items() if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)}


def assert_meshes_agree(task, shapes, tol: float = 2e-5) -> dict[tuple, jax.stages.Compiled]:
    """Metrics, gradient and variables of a step on every mesh are those on one device, up to `tol` of each array's largest.

    Returns:
      The compiled step of every mesh.
    """
    _, step, arguments = compiled_step(task, mesh_of((1, 1, 1)))
    expected = _outcome(step, *arguments)
    steps = {}
    for shape in shapes:
        _, steps[shape], arguments = compiled_step(task, mesh_of(shape))
        for path, array in _outcome(steps[shape], *arguments).items():
            # A residual is a difference of states of order one, and rounds like them.
            is_residual = path[0] == "sums" and path[1].rpartition("/")[2] in ("abs", "rel")
            array, on_one = array.astype(float), expected[path].astype(float)
            scale = np.max(np.abs(on_one), initial=1.0 if is_residual else 1e-2)
            np.testing.assert_allclose(array, on_one, rtol=0, atol=tol * scale, err_msg=f"{shape} {'/'.join(path)}")
    return steps


def assert_a_run_moves(
    make_task, modules, tmp_path, monkeypatch, rtol: float, names=("train/loss", "valid/loss"), halfway=()
) -> None:
    """Six steps that go from eight devices, split every way, to one leave the log of six steps on eight.

    Args:
      make_task: a task whose config evaluates, saves and logs often enough.
      modules: those, beside the loop, that call `make_mesh`.
      rtol: of the metrics with these names.
      halfway: sizes of a mesh that has steps 3 and 4, if any.
    """

    def train(workdir, sizes, steps):
        count = int(np.prod(list(sizes.values())))
        for module in (loop, *modules):
            monkeypatch.setattr(module, "make_mesh", lambda _: make_mesh(sizes, jax.devices()[:count]))
        task = make_task()
        task.config.steps = steps
        return loop.train(task, task.config, workdir)

    expected = train(tmp_path / "unbroken", {"data": 8}, 6)
    train(tmp_path / "moved", {"data": 2, "fsdp": 2, "model": 2}, 2)
    if halfway:
        train(tmp_path / "moved", halfway, 4)
    moved = train(tmp_path / "moved", {"data": 1}, 6)
    for name in names:
        ours, theirs = ([e[name] for e in lines(tmp_path / run) if name in e] for run in ("moved", "unbroken"))
        np.testing.assert_allclose(ours, theirs, rtol=rtol)
    assert int(moved.step) == int(expected.step) == 6
