"""The command line: exit codes, one-line errors, what each option prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.calls import Run, one_line

import mergekern as mk
from mergekern import dispatch
from mergekern.engine.config import load_config

from accuracy import assert_bits_equal
from engine.models import linear, nothing_left, read_folder, tensors, ties, write_file, write_folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration that merges two folders of tensors(0) and tensors(1)."""
    folders = [write_folder(tmp_path / name, tensors(i)) for i, name in enumerate("ab")]
    (folders[0] / "README.md").write_text("old")
    path = tmp_path / "merge.yml"
    path.write_text(json.dumps(linear(*folders)))
    return path


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mergekern", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


# ---- merge -----------------------------------------------------------------------------------


def test_merge_says_what_it_did(run: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, errors = run("merge", config, out)
    assert (code, errors) == (0, "")
    floats = sum(x.is_floating_point() for x in tensors().values())
    assert printed.startswith(f"{out}: linear, {floats} tensors merged, 1 copied, ")
    assert "not carried along from the base folder: README.md" in printed
    for key, x in mk.merge_state_dicts([tensors(0), tensors(1)], "linear", weight=1).items():
        assert_bits_equal(read_folder(out)[key], x)


def test_quiet_prints_nothing(run: Run, config: Path, tmp_path: Path) -> None:
    for i, option in enumerate(("--quiet", "-q")):
        assert run("merge", config, tmp_path / str(i), option) == (0, "", "")


def test_verbose_names_every_file(run: Run, config: Path, tmp_path: Path) -> None:
    code, printed, _ = run("merge", config, tmp_path / "out", "-v", "--shard-size", "1KB")
    assert code == 0
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert path.name in printed
    assert "carried along: config.json" in printed


def test_dropped_tensors_are_named(run: Run, config: Path, tmp_path: Path) -> None:
    data = json.loads(config.read_text())
    data["exceptions"] = [{"filter": "head", "action": "drop"}]
    config.write_text(json.dumps(data))
    _, printed, _ = run("merge", config, tmp_path / "out")
    assert "dropped as the configuration says: head.weight" in printed


def test_only_and_skip_merge_a_part(run: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--only", "encoder.*", "--only", "head*", "--skip", "*.bias"]
    code, printed, _ = run("merge", config, out, *options)
    assert code == 0
    assert ": linear, 5 tensors merged, " in printed
    merged = mk.merge_state_dicts([tensors(0), tensors(1)], "linear", weight=1)
    for key, x in read_folder(out).items():
        part = key.startswith(("encoder", "head")) and not key.endswith("bias")
        assert_bits_equal(x, (merged if part else tensors(0))[key])
    assert load_config(out / "mergekern_config.yml").only == ("encoder.*", "head*")
    said = one_line(*run("merge", config, tmp_path / "none", "--skip", "head"))
    assert "pattern of 'skip' fits no tensor; got 'head'" in said
    assert nothing_left(tmp_path, "none")


def test_seed_changes_the_masks(run: Run, tmp_path: Path) -> None:
    files = [write_file(tmp_path / f"{i}.safetensors", tensors(i)) for i in range(2)]
    config = tmp_path / "merge.yml"
    config.write_text(json.dumps(ties(*files, method="dare_linear", density=0.5)))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run("merge", config, tmp_path / name, "--seed", seed)[0] == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_progress_bar_and_summary_on_a_terminal(config: Path, tmp_path: Path) -> None:
    """The bar is on stderr, if that is a terminal; stdout holds the summary alone."""
    pty = pytest.importorskip("pty", reason="no pseudo terminals here")
    leader, follower = pty.openpty()
    arguments = [sys.executable, "-m", "mergekern", "merge", config, tmp_path / "out"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=follower, text=True)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # EIO: the process has closed its end
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"merging" in shown
    assert "merging" not in printed
    assert "tensors merged" in printed


@pytest.mark.filterwarnings("always::mergekern.ConfigWarning")
def test_settings_without_effect_are_named_on_stderr(run: Run, tmp_path: Path) -> None:
    base, a = (write_folder(tmp_path / name, tensors(i)) for i, name in enumerate("ab"))
    density = [{"filter": "atn", "value": 0.1}, {"filter": "mpl", "value": 0.2}, {"value": 1}]
    path = tmp_path / "merge.yml"
    path.write_text(json.dumps(ties(base, a, density=density)))
    code, printed, errors = run("merge", path, tmp_path / "out", "--quiet")
    assert (code, printed) == (0, "")
    assert errors.splitlines() == [
        "mergekern: config: without effect:",
        "  density of all models: filter 'atn' fits no tensor",
        "  density of all models: filter 'mpl' fits no tensor",
    ]


def test_host_changes_the_result(run: Run, tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / n, tensors(i, torch.bfloat16)) for i, n in enumerate("abc")]
    path = tmp_path / "merge.yml"
    path.write_text(json.dumps(ties(*folders)))
    found = []
    for host in ([], ["--host", "mergekit"]):
        out = tmp_path / f"out{len(found)}"
        assert run("merge", path, out, *host)[0] == 0
        found.append(read_folder(out)["head.weight"])
    assert not torch.equal(*found)


# ---- errors ----------------------------------------------------------------------------------


def test_errors_are_one_line_and_exit_code_2(run: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bad = tmp_path / "bad.yml"
    bad.write_text("merge_method: linear\nslices: []\n")
    (tmp_path / "file").touch()
    for arguments, text in (
        ((tmp_path / "none.yml", out), "no such file"),
        ((tmp_path, out), "no such file"),
        ((bad, out), "key 'slices' is not supported"),
        ((config, tmp_path / "a"), "output exists already"),
        ((config, tmp_path / "file" / "out"), "cannot be written"),
        ((config, out, "--memory", "1"), "tensor embeddings.word.weight needs 1 MiB"),
        ((config, out, "--memory", "lots"), "memory: no size"),
        ((config, out, "--shard-size", "-3"), "shard_size: no size"),
        ((config, out, "--device", "cuda:77"), "device"),
        ((config, out, "--backend", "fast"), "no such backend"),
        ((config, out, "--host", "nobody"), "linear: unknown host; got 'nobody'; expected"),
    ):
        errors = one_line(*run("merge", *arguments))
        assert text in errors
        assert errors.count("\n") == 1
    assert nothing_left(tmp_path, "out")


def test_misfits_are_one_error_of_a_line_each(run: Run, config: Path, tmp_path: Path) -> None:
    changed = tensors(1)
    del changed["head.weight"], changed["logit_scale"]
    write_folder(tmp_path / "b", changed)
    errors = one_line(*run("merge", config, tmp_path / "out"))
    assert errors.count("missing from") == 2
    assert errors.count("\n") == 3


def test_verbose_shows_the_traceback(run: Run, config: Path, tmp_path: Path) -> None:
    for option in ("-v", "--verbose"):
        code, _, errors = run("merge", config, tmp_path / "a", option)
        assert code == 2
        assert "Traceback" in errors
        assert errors.rstrip().splitlines()[-1].startswith("mergekern: ")


def test_quiet_still_prints_errors(run: Run, config: Path, tmp_path: Path) -> None:
    assert "output exists" in one_line(*run("merge", "-q", config, tmp_path / "a"))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("merge",),
        ("merge", "only.yml"),
        ("merge", "a.yml", "b", "c"),
        ("merge", "a.yml", "b", "--nonsense"),
        ("merge", "a.yml", "b", "--seed", "x"),
        ("merge", "a.yml", "b", "--memory"),
        ("inspect",),
        ("doctor", "extra"),
        ("--nonsense",),
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_usage_errors_exit_2(run: Run, arguments: tuple[str, ...]) -> None:
    code, printed, errors = run(*arguments)
    assert code == 2
    assert printed + errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("arguments", [("--help",), ("merge", "--help"), ("doctor", "--help")])
def test_help_exits_0(run: Run, arguments: tuple[str, ...]) -> None:
    code, printed, errors = run(*arguments)
    assert (code, errors) == (0, "")
    assert "Usage: mergekern" in printed


def test_full_disk_in_another_process(config: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from mergekern.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900, resource.RLIM_INFINITY))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", config, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    errors = one_line(done.returncode, done.stdout, done.stderr)
    assert "out: writing failed (File too large)" in errors
    assert nothing_left(tmp_path, "out")


def test_python_m_mergekern(config: Path, tmp_path: Path) -> None:
    done = command("merge", config, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tensors merged" in done.stdout
    done = command("merge", config, tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}: complete already\n")
    done = command("merge", config, tmp_path / "out", "--seed", "1")
    assert "output exists" in one_line(done.returncode, done.stdout, done.stderr)
    done = command("merge", config, tmp_path / "new", MERGEKERN_BACKEND="nonsense")
    assert "no such backend" in one_line(done.returncode, done.stdout, done.stderr)
    assert nothing_left(tmp_path, "new")


# ---- inspect and doctor ----------------------------------------------------------------------


def test_inspect_lists_every_tensor_in_full(run: Run, tmp_path: Path) -> None:
    long = "encoder.layer.0." + "very_long_name." * 12 + "weight"
    odd = "odd[bold]name[/bold][3]"
    content = tensors() | {long: torch.zeros(3, 5).half(), odd: torch.zeros(1000)}
    code, printed, _ = run("inspect", write_file(tmp_path / "m.safetensors", content))
    assert code == 0
    lines = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    rows = {line[1].strip(): line[2:] for line in lines}
    assert set(rows) == set(content)
    assert [c.strip() for c in rows[long][:3]] == ["float16", "[3, 5]", "30"]
    assert [c.strip() for c in rows[odd][:3]] == ["float32", "[1000]", "4,000"]
    elements = sum(x.numel() for x in content.values())
    assert f"{len(content)} tensors, {elements:,} elements" in printed


def test_inspect_folder_and_filter(run: Run, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m", tensors(), shards=2)
    write_folder(root / "2_Dense", {"linear.weight": torch.ones(2)})
    code, printed, _ = run("inspect", root, "--filter", "2_Dense")
    assert code == 0
    assert "2_Dense/linear.weight" in printed
    assert "1 tensors, 2 elements" in printed
    assert "head.weight" not in printed


def test_inspect_of_something_else(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"nothing")
    assert str(path) in one_line(*run("inspect", path))
    assert "no such file or folder" in one_line(*run("inspect", tmp_path / "none"))


def test_doctor_shows_every_backend_and_reason(run: Run) -> None:
    code, printed, errors = run("doctor")
    assert (code, errors) == (0, "")
    assert f"mergekern {mk.__version__}, torch {torch.__version__}" in printed
    rows = {r.split("│")[1].strip(): r for r in printed.splitlines() if r.startswith("│")}
    assert set(rows) == set(dispatch.OPS)
    for op in dispatch.OPS:
        cells = dict(zip(dispatch.BACKENDS, map(str.strip, rows[op].split("│")[2:-1]), strict=True))
        for backend in dispatch.BACKENDS:
            emulated = backend == "cuda" and dispatch.emulating()
            device = "cuda" if backend in ("cuda", "triton") and not emulated else "cpu"
            reason = dispatch.why_not(backend, op, device)
            assert cells[backend] == ("-" if reason else "emulated" if emulated else "yes")
            assert reason is None or reason in printed


def test_doctor_counts_the_threads_of_the_environment() -> None:
    done = command("doctor", MERGEKERN_THREADS="3")
    assert done.returncode == 0
    if dispatch.why_not("cpu", "weighted_sum", "cpu") is None:
        assert re.search(r"\b3 threads", done.stdout)
        done = command("doctor", MERGEKERN_THREADS="three")
        assert "MERGEKERN_THREADS" in one_line(done.returncode, "", done.stderr)


def test_bench_outside_of_a_checkout(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert "bench" in one_line(*run("bench"))
