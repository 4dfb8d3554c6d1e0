"""mergekern adapters: folders in, a folder out, one line on what was lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekern as mk
from mergekern.cli import run

from accuracy import assert_bits_equal
from adapters.random_adapters import adapter


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    found = []
    for i in range(3):
        mk.save_adapter(adapter(i), tmp_path / f"task-{i}")
        found.append(str(tmp_path / f"task-{i}"))
    return found


def test_it_is_merge_adapters(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    options = ["--method", "knots_ties", "--density", "0.3", "--lambda", "0.6", "--rank", "5"]
    assert run(["adapters", *folders, "--out", str(out), *options]) == 0
    expected = mk.merge_adapters(folders, "knots_ties", density=0.3, lambda_=0.6, rank=5)
    got = mk.load_adapter(out)
    for name, f in expected.modules.items():
        assert_bits_equal(got.modules[name].a, f.a)
        assert_bits_equal(got.modules[name].b, f.b)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{out}: 3 modules of rank 5 to 5, by knots_ties"
    worst = max(expected.lost.values())
    assert printed[1].startswith(f"truncated: {worst:.2%} of the norm left out at most, in ")


def test_weights(folders: list[str], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    weights = [x for w in ("1", "-0.5", "2") for x in ("--weight", w)]
    assert run(["adapters", *folders, "--out", str(out), "--method", "cat", "-q", *weights]) == 0
    expected = mk.merge_adapters(folders, "cat", weight=[1, -0.5, 2])
    assert_bits_equal(mk.load_adapter(out).modules["stem"].b, expected.modules["stem"].b)


def test_a_report(folders: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib: not installed")
    out = tmp_path / "merged"
    assert run(["adapters", *folders, "--out", str(out), "--report", str(out), "-q"]) == 0
    numbers = json.loads((out / "report.json").read_text())
    assert numbers["adapters"] == folders
    assert numbers["modules"] == mk.study_adapters(folders, mk.load_adapter(out)).plain()["modules"]
    assert (out / "report.png").is_file()
    again = ["adapters", *folders, "--out", str(tmp_path / "again"), "--report", str(out)]
    assert run(again) == 2
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--method", "knots"], "unknown method"),
        (["--rank", "0"], "rank is no rank"),
        (["--weight", "1", "--weight", "2"], "weight"),
        (["--method", "svd", "--density", "0.5"], "no such parameters"),
        (["--method", "linear", "--density", "0.5"], "linear trims nothing"),
        (["--memory", "1GiB"], "--memory is for --into"),
    ],
    ids=lambda x: x[1] if isinstance(x, list) else "",
)
def test_errors_are_one_line(
    change: list[str],
    words: str,
    folders: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "merged"
    assert run(["adapters", *folders, "--out", str(out), *change]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not out.exists()


def test_an_output_is_not_written_over(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["adapters", *folders, "--out", folders[0]]) == 2
    assert "OUT exists" in capsys.readouterr().err


def test_into_a_base(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {"blocks.0.q": (48, 40), "blocks.0.fc": (33, 48), "stem": (20, 3, 5, 5)}
    base = {f"{name}.weight": torch.zeros(shape) for name, shape in weights.items()}
    save_file({**base, "norm": torch.ones(3)}, tmp_path / "model.safetensors")
    options = ["--method", "cat", "--into", str(tmp_path / "model.safetensors"), "-q"]
    assert run(["adapters", folders[0], *options, "--out", str(tmp_path / "out")]) == 0
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, f in mk.load_adapter(folders[0]).modules.items():
        assert_bits_equal(got[f"{name}.weight"], f.delta().float())
    assert_bits_equal(got["norm"], torch.ones(3))
    save_file({"norm": torch.ones(3)}, tmp_path / "model.safetensors")
    assert run(["adapters", *folders, *options, "--out", str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 of 3 parts do not fit the base; got blocks.0.fc.weight (no such tensor)" in line
    assert not (tmp_path / "other").exists()
