"""Runs every golden case of a directory tree: `pytest tests/test_goldens.py --goldens DIR`.

What to do with a case follows from `part` and `kind` in its JSON alone. A part that is not built yet is skipped by
name; an unknown kind of a part that is built fails.
"""

import json
import pathlib

import pytest

from tests.golden import Case
from tests.kinds import core, deq_flow, deq_flow_data, deq_lm, ignn, mdeq

# Parts of the project that exist, each with its kinds: name -> check(case, sub).
PARTS = {
    "core": core.KINDS,
    "deq_lm": deq_lm.KINDS,
    "ignn": ignn.KINDS,
    "mdeq": mdeq.KINDS,
    "deq_flow": deq_flow.KINDS | deq_flow_data.KINDS,
}
NOT_BUILT_YET = ("deq_inr", "deq_ddim")

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
    if part in NOT_BUILT_YET:
        pytest.skip(f"{part} is not built yet")
    assert part in PARTS, f"unknown part {part!r} in {path}"
    assert kind in PARTS[part], f"{part} has no kind {kind!r} ({path}); known: {', '.join(PARTS[part])}"
    PARTS[part][kind](Case.load(path), sub)
