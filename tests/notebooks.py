"""The `.ipynb` that belongs to a notebook's `.py`.

    python -m tests.notebooks

The same text always gives the same file: no outputs, no versions, and a cell is identified by what it says.
"""

import hashlib
import pathlib

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(source: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook in a percent-format `.py`."""
    notebook = jupytext.reads(source.read_text(), fmt="py:percent")
    notebook.metadata, notebook.nbformat, notebook.nbformat_minor = METADATA, 4, 5
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.metadata, cell.id = {}, digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    nbformat.validate(notebook)
    return notebook


def generated(source: pathlib.Path) -> str:
    """The content of the `.ipynb`."""
    return nbformat.writes(read(source)) + "\n"


if __name__ == "__main__":
    for source in sorted(FOLDER.glob("*.py")):
        source.with_suffix(".ipynb").write_text(generated(source))
        print(f"Wrote {source.with_suffix('.ipynb')}")
