"""Notebooks are what their sources say, begin alike, and run from top to bottom as a user runs them."""

import os
import re
import resource

import nbclient
import pytest

from tests.notebooks import FOLDER, generated, read

SOURCES = sorted(FOLDER.glob("*.py"))
BADGE = "https://colab.research.google.com/github/deqjax/deqjax/blob/main/notebooks/"
# What a checkout has beside the notebooks.
CHECKOUT = ("configs", "deqjax", "experiments")
WEIGHTS = tuple(f"notebooks/{path.name}" for path in FOLDER.glob("*.safetensors"))
by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def code_cells(source):
    return [cell.source for cell in read(source).cells if cell.cell_type == "code"]


@by_name
def test_a_notebook_is_what_its_source_says(source):
    notebook = source.with_suffix(".ipynb")
    assert notebook.is_file() and notebook.read_text() == generated(source), "run `make notebooks`"


def test_no_notebook_lacks_a_source():
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [source.stem for source in SOURCES]


@by_name
def test_notebooks_begin_alike(source):
    assert code_cells(source)[0] == code_cells(SOURCES[0])[0]
    assert re.findall(re.escape(BADGE) + r"(\w+)\.ipynb", source.read_text()) == [source.stem]


@by_name
def test_what_a_notebook_links_to_exists(source):
    links = re.findall(r"\]\((?!https:)([^)#]+)", "".join(cell.source for cell in read(source).cells))
    missing = [link for link in links if not (FOLDER / link).is_file()]
    assert not missing


@by_name
def test_a_notebook_runs(source, tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "notebooks").mkdir(parents=True)
    for name in (*CHECKOUT, *WEIGHTS):
        (checkout / name).symlink_to(FOLDER.parent / name)
    # A user's machine: one CPU device, float32, all optimisations. Only what was compiled is shared.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "MPL"))}
    environment |= {name: value for name, value in os.environ.items() if name.startswith(("JAX_COMP", "JAX_PERS"))}
    environment |= {"JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(tmp_path / "ipython"), "TMPDIR": str(tmp_path)}
    notebook = read(source)
    client = nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": checkout / "notebooks"}})
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    client.execute(env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Three minutes on an idle machine; what else this one does must not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180
    said = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("1 x CPU" in output.get("text", "") for output in said)
    assert any("image/png" in output.get("data", {}) for output in said)
    # Nothing is left in the checkout.
    assert sorted(path.name for path in checkout.iterdir()) == sorted((*CHECKOUT, "notebooks"))
    assert sorted(f"notebooks/{path.name}" for path in (checkout / "notebooks").iterdir()) == sorted(WEIGHTS)
