"""merge --json, --dry-run and plain lines: what programs and logs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.calls import Run

import mergekern as mk
from mergekern.engine import progress

from engine.models import linear, nothing_left, tensors, write_folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folders = [write_folder(tmp_path / name, tensors(i)) for i, name in enumerate("ab")]
    path = tmp_path / "merge.yml"
    path.write_text(json.dumps(linear(*folders)))
    return path


def events(printed: str) -> list[dict[str, Any]]:
    """All of stdout; "Infinity" and "NaN" are no JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    found = [json.loads(line, parse_constant=refuse) for line in printed.splitlines()]
    assert all(next(iter(event)) == "event" for event in found)
    return found


def floats() -> int:
    return sum(x.is_floating_point() for x in tensors().values())


# ---- --json ----------------------------------------------------------------------------------


def test_json_tells_the_plan_and_what_was_done(run: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, errors = run("merge", config, out, "--json")
    assert (code, errors) == (0, "")
    plan, *shown, done = events(printed)
    sizes = {k: x.nbytes for k, x in tensors().items()}
    read = 2 * sum(sizes.values()) - sizes["embeddings.position_ids"]  # which is copied
    assert plan == {
        "event": "plan",
        "tensors": len(sizes),
        "bytes_read": read,
        "bytes_written": sum(sizes.values()),
    }
    assert {e["event"] for e in shown} <= {"progress"}
    assert done["event"] == "done"
    assert Path(done["out"]) == out
    assert json.loads(Path(done["manifest"]).read_text())["method"] == "linear"
    assert (done["merged"], done["copied"]) == (floats(), 1)
    assert (done["bytes_read"], done["bytes_written"]) == (read, sum(sizes.values()))
    assert done["seconds"] > 0

    code, printed, errors = run("merge", config, out, "--json")  # which is there
    assert (code, errors) == (0, "")
    (done,) = events(printed)
    assert (done["event"], done["bytes_read"], done["bytes_written"]) == ("done", 0, 0)


def test_json_counts_every_byte(
    run: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is expected is what is done, and known before the first of it."""
    monkeypatch.setattr(progress.JsonLines, "_due", lambda *_: True)
    code, printed, _ = run("merge", config, tmp_path / "out", "--json")
    assert code == 0
    plan, *shown, _ = events(printed)
    total = plan["bytes_read"] + plan["bytes_written"]
    done = [event["bytes_done"] for event in shown]
    assert {event["bytes_total"] for event in shown} == {total}
    assert done == sorted(done)
    assert done[-1] == total


def test_json_tells_of_errors(run: Run, config: Path, tmp_path: Path) -> None:
    """As an event, and as the line on stderr that every error is; what is wrong comes first."""
    out = tmp_path / "out"
    for arguments, kind, text in (
        ((tmp_path / "none.yml", out), "ConfigError", "no such file"),
        ((config, tmp_path / "a"), "CheckpointError", "output exists already"),
        ((config, out, "--memory", "lots"), "ArgumentError", "memory: no size"),
        ((config, out, "--sweep", "weight"), "ArgumentError", "--sweep: not understood"),
    ):
        code, printed, errors = run("merge", *arguments, "--json")
        *_, error = events(printed)
        assert code == 2
        assert (error["event"], error["kind"]) == ("error", kind)
        assert text in error["message"]
        assert errors == f"mergekern: {error['message']}\n"
    assert nothing_left(tmp_path, "out")


def test_json_of_a_sweep_has_a_done_for_each_folder(run: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run("merge", config, out, "--sweep", "weight=0.5,2", "--json")
    assert code == 0
    done = [e for e in events(printed) if e["event"] == "done"]
    assert [Path(e["manifest"]).parent for e in done] == [out / "weight=0.5", out / "weight=2"]
    assert all(Path(e["manifest"]).is_file() for e in done)


# ---- --dry-run -------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done(run: Run, config: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, printed, errors = run("merge", config, tmp_path / "out", "--dry-run")
    assert (code, errors) == (0, "")
    first, second, third = printed.splitlines()
    assert first == f"linear: {floats()} tensors to merge, 1 to copy"
    assert second.startswith("reads 0.00 MB in one pass, writes 0.00 MB, needs at least 0.0 MiB")
    assert third.startswith("takes about 0:0")
    assert all(word in third for word in ("reading", "computing", "writing"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_as_json(run: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, errors = run("merge", config, out, "--dry-run", "--json")
    assert (code, errors) == (0, "")
    (plan,) = events(printed)
    expected, outlook = mk.plan_merge(config, out)
    assert (plan["tensors"], plan["passes"]) == (len(tensors()), 1)
    assert plan["bytes_read"] == outlook.bytes_read
    assert plan["bytes_written"] == expected.bytes_written
    assert plan["details"] == expected.describe()
    assert plan["seconds"] >= 0


def test_a_dry_run_of_copies_alone(run: Run, tmp_path: Path) -> None:
    """Nothing is read to learn a rate, and a rate that is unknown is null."""
    folders = [write_folder(tmp_path / n, {"steps": torch.arange(4)}) for n in "ab"]
    config = tmp_path / "merge.yml"
    config.write_text(json.dumps(linear(*folders)))
    code, printed, _ = run("merge", config, tmp_path / "out", "--dry-run", "--json")
    assert code == 0
    (plan,) = events(printed)
    assert plan["read_rate"] is plan["compute_rate"] is None
    code, printed, _ = run("merge", config, tmp_path / "out", "--dry-run")
    assert code == 0
    assert printed.startswith("linear: 0 tensors to merge, 1 to copy\n")
    assert "reading" not in printed


# ---- lines -----------------------------------------------------------------------------------


def test_lines_where_stderr_is_no_terminal(
    run: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress._Lines, "_due", lambda *_: True)
    code, printed, errors = run("merge", config, tmp_path / "out")
    assert code == 0
    assert printed.startswith(f"{tmp_path / 'out'}: linear, ")
    lines = errors.splitlines()
    assert all(line.startswith("merging: ") for line in lines)
    assert lines[-1].startswith("merging: 100 %, ")
    _, _, errors = run("verify", tmp_path / "out")
    assert errors.splitlines()[-1].startswith("verifying: 100 %, ")
    for quiet in (("merge", config, tmp_path / "new", "-q"), ("verify", tmp_path / "out", "-q")):
        assert run(*quiet) == (0, "", "")
