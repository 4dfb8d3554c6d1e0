"""mergekern verify: what it prints, and its exit codes."""

from __future__ import annotations

from pathlib import Path

from cli.calls import Run, one_line

import mergekern as mk

from engine.models import linear, tensors, write_folder


def test_verify(run: Run, tmp_path: Path) -> None:
    models = [write_folder(tmp_path / name, tensors(i)) for i, name in enumerate("ab")]
    out = tmp_path / "out"
    mk.merge_checkpoints(linear(*models), out, progress=False)
    count = len(tensors())
    said = f"{out}: {count} tensors, 3 files: all as recorded\n"
    assert run("verify", out) == (0, said, "")
    assert run("verify", out, "--quiet") == (0, "", "")
    code, printed, _ = run("verify", out, "--inputs", "--replay", "head*")
    more = f"{2 * count - 1} tensors of the inputs, 1 tensors merged again"
    assert (code, printed) == (0, f"{out}: {count} tensors, 3 files, {more}: all as recorded\n")

    (out / "config.json").write_text("{}")
    (out / "new.txt").touch()
    code, printed, _ = run("verify", out)
    assert code == 1
    assert printed.splitlines() == [
        "config.json: is not what was written",
        "note: new.txt: not part of the merge",
        f"{out}: {count} tensors, 3 files: 1 not as recorded",
    ]
    assert run("verify", out, "-q") == (1, "config.json: is not what was written\n", "")
    assert "holds no mergekern_manifest.json" in one_line(*run("verify", tmp_path))
