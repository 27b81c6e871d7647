"""The pages of the user's guide run as they stand, print what stands below, and name what exists."""

import dataclasses
import importlib
import pathlib
import re
import shlex

import jax
import pytest

import deqjax
from benchmarks import choices
from benchmarks.problems import linear_problems
from deqjax.cli import parse
from deqjax.nn.config import DEQConfig

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "scaling.md").read_text()
OPTIONS = [option for option in re.findall(r"`([^`]+)`", TEXT) if option.startswith("--") and option != "--config.mesh"]


def test_the_commands_of_the_scaling_page_parse():
    (command,) = {c for c in re.findall(r"`(python -m experiments\.deq_lm [^`]+)`", TEXT) if "..." not in c}
    values = parse(shlex.split(command)[2:])
    assert values.config.mesh.data == -1 and values.workdir == "runs/lm"


@pytest.mark.parametrize("options", OPTIONS)
def test_the_options_of_the_scaling_page_parse(options):
    if options == "--workdir":
        options = "--workdir x"
    parse(["deq_lm", "--config=configs/wt103.py", *shlex.split(options.replace("PROJECT", "p"))])


PAGES = sorted((ROOT / "docs").glob("*.md"))
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@by_name
def test_the_snippets_of_a_page_run_and_print_what_stands_below(page, capsys):
    for snippet, printed in re.findall(r"```python\n(.*?)```(?:[^`]*?\n```text\n(.*?)```)?", page.read_text(), re.S):
        with jax.enable_x64(False):
            exec(snippet, {})
        out = capsys.readouterr().out
        assert out
        if printed:
            assert_same_but_for_rounding(out, printed)


def assert_same_but_for_rounding(out, printed):
    """Equal text, and numbers within a tenth or one step of each other: compilers and processors round differently."""
    number = re.compile(r"(?<![\w.])-?\d+(?:\.\d*)?(?:e[-+]\d+)?")
    squeezed = lambda text: re.sub(r"\s+", "", number.sub("#", text))
    assert squeezed(out) == squeezed(printed)
    for here, there in zip(number.findall(out), number.findall(printed), strict=True):
        slack = 1.0 if "." not in there and "e" not in there else 0.02 if "e" not in there else 2 * abs(float(there))
        assert abs(float(here) - float(there)) <= max(slack, 0.1 * abs(float(there))), (out, printed)


@by_name
def test_the_commands_of_a_page_parse(page):
    for command in re.findall(r"`(python -m experiments\.\w+ --config [^`]+)`", page.read_text()):
        if "..." not in command:
            modes = ["train", *re.findall(r"--mode[ =](\w+)", command)]
            assert parse(shlex.split(command)[2:], modes).config.steps > 0, command


@by_name
def test_what_a_page_names_exists(page):
    text = page.read_text()
    named = {f"{folder}/{module}.py" for folder, module in re.findall(r"\b(experiments|benchmarks)\.(\w+)", text)}
    named |= set(re.findall(r"\b(?:configs|deqjax)/[\w/]+\.py", text))
    named |= {f"docs/{name}" for name in re.findall(r"\]\((\w+\.(?:png|md))\)", text)}
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing


@by_name
def test_the_names_of_a_page_can_be_imported(page):
    for name in re.findall(r"`(deqjax(?:\.\w+)+)[`(]", page.read_text()):
        parts = name.split(".")
        for n in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:n]))
            except ImportError:
                continue
            for part in parts[n:]:
                found = getattr(found, part)
            break


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = []
    for name in re.findall(r"^::: ([\w.]+)$", pages, re.M):
        module, _, attribute = name.rpartition(".")
        documented.append(getattr(importlib.import_module(module), attribute))
    missing = [name for name in deqjax.__all__ if name != "__version__" and getattr(deqjax, name) not in documented]
    assert not missing


def test_every_status_is_explained_as_the_library_does():
    page = (ROOT / "docs" / "convergence.md").read_text()
    assert all(f"| `{status.name}` | {status.explanation} |" in page for status in deqjax.Status)


# Which solver, which gradient? -------------------------------------------------------------------------------------------


def test_the_table_of_solvers_counts_what_the_benchmark_counts():
    counted = choices.evaluations(next(iter(linear_problems().values())), choices.solvers()["`Anderson()`"])
    (row,) = [row for row in table("choosing", f"| solver | {' | '.join(linear_problems())} |") if row[0] == "`Anderson()`"]
    assert abs(int(counted) - int(row[1])) <= 1


def test_the_table_of_gradients_has_the_rules_of_the_benchmark():
    rows = table("choosing", "| gradient | relative error | MiB, 40 solver steps | MiB, 160 solver steps |")
    assert [row[0] for row in rows] == list(choices.rules())
    for name, rule in choices.rules().items():
        assert eval(name.strip("`"), vars(choices)) == rule


# From TorchDEQ -----------------------------------------------------------------------------------------------------------

# Of `torchdeq.add_deq_args`, 0.1.0.
TORCHDEQ = [
    "f_solver", "b_solver", "f_max_iter", "b_max_iter", "f_tol", "b_tol", "f_stop_mode", "b_stop_mode", "eval_factor",
    "eval_f_max_iter", "norm_type", "norm_no_scale", "norm_clip", "norm_clip_value", "norm_target_norm", "sn_n_power_iters",
    "core", "ift", "hook_ift", "n_states", "indexing", "gamma", "grad", "tau", "sup_gap", "sup_loc", "jac_loss_weight",
    "jac_loss_freq", "jac_incremental", "sradius_mode",
]  # fmt: skip


def test_every_torchdeq_option_is_in_the_table_and_has_its_default_here():
    page = (ROOT / "docs" / "from_torchdeq.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| the same", page, re.M)
    assert [name for name, _ in rows] == TORCHDEQ
    theirs = {name: eval(default) for name, default in rows}
    ours = dataclasses.asdict(DEQConfig.from_config(theirs))
    in_one_form = lambda value: (value,) if isinstance(value, int) and not isinstance(value, bool) else value
    for preset, different in (("torchdeq", set()), (None, {"b_stop_mode"})):
        defaults = dataclasses.asdict(DEQConfig(preset=preset))
        assert {name for name in TORCHDEQ if in_one_form(ours[name]) != in_one_form(defaults[name])} == different


# All that its modules export, and the classes that its documentation names.
TORCHDEQ_FUNCTIONS = """add_deq_args get_deq reset_deq register_deq DEQSliced DEQIndexing DEQConfig SolverStat deq_decorator
get_solver register_solver anderson_solver broyden_solver fixed_point_iter simple_fixed_point_iter solver_stat_from_final_step
apply_norm reset_norm remove_norm register_norm register_norm_module WeightNorm SpectralNorm reset_dropout VariationalDropout
VariationalDropout1d VariationalDropout2d VariationalDropout3d VariationalDropToken1d VariationalDropToken2d
VariationalDropToken3d fp_correction register_weight_func jac_reg power_method backward_factory mem_gc mixed_init"""


def test_every_torchdeq_function_is_in_the_table():
    rows = table("from_torchdeq", "| TorchDEQ | here |")
    theirs = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert not set(TORCHDEQ_FUNCTIONS.split()) - theirs


# The models' pages -------------------------------------------------------------------------------------------------------

MODELS = ("language_model", "mdeq", "ignn", "flow", "inr", "ddim")
RECIPES = "| recipe | task | data | solver, gradient | steps x batch | command |"
RESULTS = "| recipe | value | steps | tolerance | time | hardware | command |"


def table(page, header):
    """The rows of the table with this header, as lists of cells."""
    below = (ROOT / "docs" / f"{page}.md").read_text().partition(header + "\n")[2]
    rows = [line.split(" | ") for line in below.partition("\n\n")[0].splitlines()[1:]]
    return [[cell.strip("| ") for cell in row] for row in rows]


def carried_out(config):
    """What a recipe's card says of solver and gradient, and of steps and batch."""
    size = f"{config.steps:,} x {config.data.batch_size or 'all'}"
    if "deq" not in config:
        return f"`{config.sampler.solver}`, {config.sampler.timesteps} timesteps", size
    deq = DEQConfig.from_config(config.deq)
    steps = deq.grad if isinstance(deq.grad, int) else deq.grad[0]
    gradient = f"{steps} phantom step" + "s" * (steps > 1) + f" damped by {deq.tau}" * (deq.tau != 1)
    gradient = "implicit" if deq.ift or deq.hook_ift else gradient
    solver = f"`{deq.f_solver}` {deq.f_max_iter}" if deq.f_max_iter else "no solve"
    return f"{solver}, {gradient}" + f", {deq.n_states} states" * (deq.n_states > 1), size


@pytest.mark.parametrize("page", MODELS)
def test_the_recipes_of_a_model_say_what_their_configs_do(page):
    rows = table(page, RECIPES)
    assert rows
    for recipe, _, _, solver, size, command in rows:
        assert f"configs/{recipe.strip('`')}" in command
        name, _, variant = recipe.strip("`").partition(":")
        module = importlib.import_module(f"configs.{name.removesuffix('.py')}")
        assert (solver, size) == carried_out(module.get_config(*([variant] if variant else []))), recipe


@pytest.mark.parametrize("page", MODELS)
def test_the_results_of_a_model_are_measured_or_said_not_to_be(page):
    rows = table(page, RESULTS)
    assert rows
    for recipe, value, steps, *_, hardware, command in rows:
        assert command, recipe
        assert value.startswith("not run here") or (re.search(r"\d", value) and hardware), recipe
        assert not steps or re.fullmatch(r"[\d,]+", steps), recipe


# Papers ------------------------------------------------------------------------------------------------------------------


def test_what_to_cite_is_on_the_page_of_papers():
    citation = (ROOT / "CITATION.cff").read_text()
    page = (ROOT / "docs" / "papers.md").read_text()
    titles, urls = (re.findall(rf"^    {key}: \"?(.+?)\"?$", citation, re.M) for key in ("title", "url"))
    assert len(titles) == len(urls) > 10
    assert all(f": {title}, " in page and f"({url})" in page for title, url in zip(titles, urls, strict=True))
    assert f"version: {deqjax.__version__}\n" in citation
