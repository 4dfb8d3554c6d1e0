"""What a run that was cut short leaves is used if it can be trusted, and refused if it cannot."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import sliced
from engine.faults import Fault, Job, Run, content, control, done, kill, run, same, stop
from engine.models import write_file, write_folder

PARTS = ("pwrite", "pwritev")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return sliced.write_models(tmp_path / "models")


@pytest.fixture
def job(models: list[Path], tmp_path: Path) -> Job:
    return sliced.job(models, tmp_path / "here" / "out")


@pytest.fixture
def whole(models: list[Path], tmp_path: Path) -> dict[str, bytes]:
    other = sliced.job(models, tmp_path / "whole" / "out")
    done(other)
    return content(other.out)


def cut_short(job: Job, at: int = 6) -> None:
    """Killed when `at` parts of tensors are written."""
    assert run(job, Fault(kill, at, PARTS)).code == -9
    assert control(job.out).is_dir()
    assert not job.out.exists()


def parts(job: Job) -> int:
    """How many writes of tensors a run needs from here."""
    return sum(name in PARTS for name in done(job, Fault(kill, -1)).calls)


def test_what_is_finished_is_not_computed_again(
    models: list[Path], tmp_path: Path, job: Job, whole: dict[str, bytes]
) -> None:
    every = parts(sliced.job(models, tmp_path / "all" / "out"))
    cut_short(job)
    rest = parts(job)
    assert every - 6 <= rest < every - 3
    same(job.out, whole)


def test_no_resume_begins_again(
    models: list[Path], tmp_path: Path, job: Job, whole: dict[str, bytes]
) -> None:
    every = parts(sliced.job(models, tmp_path / "all" / "out"))
    cut_short(job)
    assert parts(job.given(resume=False)) == every
    same(job.out, whole)


# ---- another run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"seed": 3}, {"shard_size": 5000}, {"method": "dare_ties"}, {"method": "linear"}]
)
def test_a_run_of_another_plan_is_refused(
    models: list[Path], tmp_path: Path, job: Job, options: dict[str, object]
) -> None:
    cut_short(job)
    before = content(control(job.out))
    other = sliced.job(models, job.out, **{"method": "dare_ties", **options})
    end = run(other)
    assert str(job.out) in end.error
    assert "--no-resume" in end.error
    assert "\n" not in end.error
    assert content(control(job.out)) == before
    fresh = sliced.job(models, tmp_path / "fresh" / "out", **{"method": "dare_ties", **options})
    done(fresh)
    done(other.given(resume=False))
    same(job.out, content(fresh.out))


@pytest.mark.parametrize(
    "options", [{"memory": "300MiB"}, {"backend": "torch"}, {"memory": "8GiB", "backend": "cpu"}]
)
def test_what_does_not_change_the_result_may_change(
    job: Job, whole: dict[str, bytes], options: dict[str, str]
) -> None:
    cut_short(job)
    done(replace(job, threads=3).given(**options))
    same(job.out, whole)


def test_a_run_that_finished_nothing_binds_to_nothing(models: list[Path], job: Job) -> None:
    assert run(job, Fault(kill, 0, PARTS)).code == -9
    done(sliced.job(models, job.out, "linear"))


def test_two_runs_into_one_output(job: Job, whole: dict[str, bytes]) -> None:
    with Run(job, Fault(stop, 10, PARTS)) as first:
        first.stopped()
        for second in (job, job.given(resume=False)):
            end = run(second)
            assert "another process is writing" in end.error
            assert str(job.out) in end.error
        first.send(signal.SIGCONT)
        assert first.end()[:2] == (0, "")
    same(job.out, whole)


def test_the_lock_of_a_dead_process_does_not_hinder(job: Job, whole: dict[str, bytes]) -> None:
    with Run(job, Fault(stop, 10, PARTS)) as first:
        first.stopped()
        first.process.kill()
        assert first.end().code == -9
    done(job)
    same(job.out, whole)


def test_an_output_that_is_complete(models: list[Path], job: Job, whole: dict[str, bytes]) -> None:
    done(job)
    stats = {path: path.stat().st_mtime_ns for path in job.out.rglob("*")}
    again = done(job, Fault(kill, -1))
    assert not set(again.calls) & {"pwrite", "rename", "unlink"}
    assert {path: path.stat().st_mtime_ns for path in job.out.rglob("*")} == stats
    same(job.out, whole)
    other = run(sliced.job(models, job.out, "linear"))
    assert "exists already" in other.error
    done(job.given(resume=False))
    same(job.out, whole)


# ---- inputs that changed ---------------------------------------------------------------------


def replaced(victim: Path, seed: int) -> None:
    """The same names and sizes, other values."""
    keep = victim.stat()
    write_file(victim, sliced.tensors(seed))
    assert victim.stat().st_size == keep.st_size


def test_an_input_with_other_values(models: list[Path], job: Job) -> None:
    cut_short(job)
    victim = models[1] / "model.safetensors"
    before = victim.read_bytes()
    replaced(victim, 7)
    end = run(job)
    assert str(victim) in end.error
    assert "--no-resume" in end.error
    assert not job.out.exists()
    victim.write_bytes(before)
    done(job)  # what was finished is of these bytes


def test_an_input_with_other_values_and_the_old_times(models: list[Path], job: Job) -> None:
    """`cp --preserve`: the times lie, the time of the change of the inode does not."""
    cut_short(job)
    victim = models[1] / "model.safetensors"
    keep = victim.stat()
    replaced(victim, 7)
    os.utime(victim, ns=(keep.st_atime_ns, keep.st_mtime_ns))
    assert str(victim) in run(job).error
    assert not job.out.exists()


def test_an_input_with_the_same_values_and_other_times(
    models: list[Path], job: Job, whole: dict[str, bytes]
) -> None:
    cut_short(job)
    victim = models[1] / "model.safetensors"
    copied = victim.with_suffix(".copy")
    shutil.copyfile(victim, copied)
    copied.replace(victim)
    os.utime(victim, ns=(1, 1))
    done(job)
    same(job.out, whole)


@pytest.mark.parametrize("where", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("method", ["ties", "karcher", "ties_global"])
def test_one_byte_of_an_input_changed(
    models: list[Path], tmp_path: Path, where: float, method: str
) -> None:
    """Refused, or as if it had been so from the start: never a mixture of both."""
    job = sliced.job(models, tmp_path / "here" / "out", method)
    cut_short(job)
    victim = models[1] / "model.safetensors"
    data = bytearray(victim.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int(where * (len(data) - start))] ^= 1
    victim.write_bytes(data)
    end = run(job)
    if end.error:
        assert str(models[1]) in end.error
        return
    fresh = sliced.job(models, tmp_path / "fresh" / "out", method)
    done(fresh)
    same(job.out, content(fresh.out))


@pytest.mark.parametrize("method", ["ties_global", "karcher"])
def test_one_tensor_of_an_input_changed(models: list[Path], tmp_path: Path, method: str) -> None:
    """What is done depends on tensors that were not merged yet, where all were surveyed.

    Refused where what changed had been merged; else as if it had been so from the start.
    """
    victim = models[1] / "model.safetensors"
    before = sliced.tensors(1)
    taken = []
    for i, (name, x) in enumerate(before.items()):
        if not (x.is_floating_point() and x.numel() > 1):
            continue
        write_file(victim, before)
        job = sliced.job(models, tmp_path / f"{i}" / "out", method)
        cut_short(job)
        write_file(victim, {**before, name: x * 100})
        end = run(job)
        if end.error:
            assert str(victim) in end.error
            continue
        fresh = sliced.job(models, tmp_path / f"fresh {i}" / "out", method)
        done(fresh)
        same(job.out, content(fresh.out))
        taken.append(name)
    assert taken


@pytest.mark.parametrize("change", ["more tensors", "fewer tensors", "other shape", "missing"])
def test_an_input_of_another_shape(models: list[Path], job: Job, change: str) -> None:
    cut_short(job)
    tensors = sliced.tensors(1)
    if change == "more tensors":
        tensors["more"] = torch.ones(3)
    elif change == "fewer tensors":
        del tensors["scale"]
    else:
        tensors["head.weight"] = tensors["head.weight"].view(100, 10)
    shutil.rmtree(models[1])
    if change != "missing":
        write_folder(models[1], tensors)
    end = run(job)
    assert end.code == 0
    assert any(str(model) in end.error for model in models)
    assert not job.out.exists()


# ---- damage to what was left -----------------------------------------------------------------

Damage = Callable[[Path], None]


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def staged(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.safetensors"))
    assert len(found) > 2
    return found


def flip_staged(folder: Path) -> None:
    for path in staged(folder):
        for at in (0.0, 0.001, 0.3, 0.5, 0.7, 1.0):
            flip(path, at)


def shorten_staged(folder: Path) -> None:
    for i, path in enumerate(staged(folder)):
        with path.open("r+b") as file:
            file.truncate(0 if i == 0 else path.stat().st_size - 1)


def lengthen_staged(folder: Path) -> None:
    for path in staged(folder):
        path.write_bytes(path.read_bytes() + b"more")


def lose_staged(folder: Path) -> None:
    staged(folder)[0].unlink()


def change_carried(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        path.write_text("{")
    for path in folder.rglob("vocab.txt"):
        path.write_text("")


def add_foreign(folder: Path) -> None:
    (staged(folder)[0].parent / "foreign.bin").write_bytes(b"not of this run")
    (staged(folder)[0].parent / "folder").mkdir()


def journals(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("journal*") if path.is_file()]
    assert found
    assert all(path.stat().st_size for path in found)
    return found


def tear_journal(folder: Path) -> None:
    for path in journals(folder):
        path.write_bytes(path.read_bytes()[:-7])


def prolong_journal(folder: Path) -> None:
    for path in journals(folder):
        path.write_bytes(path.read_bytes() + b'{"torn": [1, "x')


def zero_end_of_journal(folder: Path) -> None:
    """What a power loss leaves of blocks that were allocated and not written."""
    for path in journals(folder):
        data = path.read_bytes()
        path.write_bytes(data[:-60] + bytes(4096))


def flip_journal(folder: Path) -> None:
    for path in journals(folder):
        data = path.read_bytes()
        lines = data.split(b"\n")
        middle = len(lines) // 2
        lines[middle] = lines[middle].replace(b"a", b"b").replace(b"1", b"2")
        path.write_bytes(b"\n".join(lines))


def repeat_journal(folder: Path) -> None:
    """The last lines twice, as after a resume that recorded them again."""
    for path in journals(folder):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines + lines[1:][-4:]))


def lose_journal(folder: Path) -> None:
    for path in journals(folder):
        path.unlink()


def empty_journal(folder: Path) -> None:
    for path in journals(folder):
        path.write_bytes(b"")


DAMAGES = (
    flip_staged,
    shorten_staged,
    lengthen_staged,
    lose_staged,
    change_carried,
    add_foreign,
    tear_journal,
    prolong_journal,
    zero_end_of_journal,
    flip_journal,
    repeat_journal,
    lose_journal,
    empty_journal,
)


@pytest.mark.parametrize("late", [False, True], ids=["midway", "before the commit"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_mended(job: Job, whole: dict[str, bytes], damage: Damage, late: bool) -> None:
    if late:
        assert run(job, Fault(kill, 0, ("rename", "replace"))).code == -9
    else:
        cut_short(job)
    damage(control(job.out))
    done(job)
    same(job.out, whole)
