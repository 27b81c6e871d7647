"""The report of runs."""

import json
import re
import struct

import pytest

from experiments.report import main


def write(workdir, factor, **config):
    workdir.mkdir()
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in range(10, 200, 10):
            entry = {"train/loss": factor / step, "train/lr": 1e-3, "train/forward/steps": 12, "train/forward/rel": 1e-3}
            file.write(json.dumps({"step": step, **entry, "train/grad_norm": "nan"}) + "\n")
        file.write(json.dumps({"step": 190, "valid/forward/spectral_radius": 0.9, "valid/loss": "inf"}) + "\n")
        file.write('{"step": 200, "train/lo')
    (workdir / "config.json").write_text(json.dumps({"seed": 0, "optimizer": config}))


def test_runs_side_by_side_in_a_picture_and_one_page(tmp_path, capsys):
    write(tmp_path / "a", 1.0, rate=0.1)
    write(tmp_path / "b<i>", 2.0, rate=0.2)
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b<i>"), "--out", str(tmp_path / "out")]) == 0
    picture = (tmp_path / "out" / "report.png").read_bytes()
    width, height = struct.unpack(">II", picture[16:24])
    assert picture.startswith(b"\x89PNG") and width > 1000 and height > 1000
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64," in page and not re.search(r"(src|href)=.?(?!data:)\w+:", page)
    assert "<td>optimizer.rate</td><td>0.1</td><td>0.2</td>" in page and "b&lt;i&gt;" in page and "<i>" not in page
    assert "<td>train/loss</td><td>0.0052632 (step 190)" in page and "spectral_radius" in page


def test_one_run_reports_into_its_own_directory(tmp_path):
    write(tmp_path / "run", 1.0)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(
            '\n{"step": 210, "valid/error": "nan"}\n{"step": 220, "valid/error": 2.0}\n{"step": 230, "valid/error": 1.0}\n'
        )
    assert main(["report", str(tmp_path / "run")]) == 0
    # An evaluation that gave no number is neither the smallest nor the largest.
    assert "<td>valid/error</td><td>1 (step 230); 1 to 2</td>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("config", ["{torn", "[1]", "null"])
def test_damaged_lines_and_settings_are_left_out(config, tmp_path):
    write(tmp_path / "run", 1.0)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(
            '\n{"step": 1, "train/loss": null}\n{"step": "x", "train/loss": 1}\n{"step": 2, "train/loss": {}}\n[1]\nnull\n'
            '{"step": 1e999, "train/loss": 7}\n' + "[" * 100_000 + "\n"
        )
    (tmp_path / "run" / "config.json").write_text(config)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "<td>train/loss</td><td>0.0052632 (step 190); 0.005263 to 0.1</td>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("content", [None, ""])
def test_a_directory_without_metrics_is_a_sentence(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and "metrics" in err and "Traceback" not in err
