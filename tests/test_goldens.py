"""Runs every golden case of a directory tree: `pytest tests/test_goldens.py --goldens DIR`.

What to do with a case follows from `part` and `kind` in its JSON alone; an unknown part or kind fails.
"""

import json
import pathlib

from tests.golden import Case
from tests.kinds import core, deq_ddim, deq_flow, deq_flow_data, deq_flow_parts, deq_inr, deq_lm, ignn, mdeq

# Parts of the project, each with its kinds: name -> check(case, sub).
PARTS = {
    "core": core.KINDS,
    "deq_ddim": deq_ddim.KINDS,
    "deq_flow": deq_flow.KINDS | deq_flow_parts.KINDS | deq_flow_data.KINDS,
    "deq_inr": deq_inr.KINDS,
    "deq_lm": deq_lm.KINDS,
    "ignn": ignn.KINDS,
    "mdeq": mdeq.KINDS,
}

HERE = pathlib.Path(__file__).parent


def default_directory():
    shared = HERE.parent.parent / "shared" / "goldens"
    return shared if shared.is_dir() else HERE / "goldens"


def pytest_generate_tests(metafunc):
    directory = pathlib.Path(metafunc.config.getoption("--goldens") or default_directory())
    items, names = [], []
    for path in sorted(directory.rglob("*.json")):
        meta = json.loads(path.read_text())
        for sub in meta.get("subs") or [None]:
            items.append((path, meta.get("part"), meta.get("kind"), sub))
            names.append("/".join([*path.relative_to(directory).with_suffix("").parts, *([sub] if sub else [])]))
    assert items, f"no golden cases under {directory}"
    metafunc.parametrize("path, part, kind, sub", items, ids=names)


def test_golden(path, part, kind, sub):
    assert part in PARTS, f"unknown part {part!r} in {path}"
    assert kind in PARTS[part], f"{part} has no kind {kind!r} ({path}); known: {', '.join(PARTS[part])}"
    PARTS[part][kind](Case.load(path), sub)
