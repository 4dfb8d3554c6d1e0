"""Killed anywhere, refused by the disk anywhere: the same command gives the same bytes.

Nothing is ever under the name of the output but the whole of it.
"""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from engine import sliced
from engine.faults import (
    READS,
    WRITES,
    Fault,
    Job,
    Run,
    content,
    control,
    done,
    fill,
    interrupt,
    kill,
    overwrite,
    refuse,
    run,
    same,
    shorten,
    tear,
)

KILLED = -9
SHIFTS = ("pwrite", "pwritev", "write")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sliced.write_models(tmp_path_factory.mktemp("models"))


class Whole:
    """An uninterrupted run: what it makes, and the calls it takes."""

    def __init__(self, job: Job) -> None:
        self.calls = done(job, Fault(kill, -1)).calls
        self.content = content(job.out)
        assert len(self.content) > 8


def places(calls: list[str], of: Sequence[str] = ()) -> list[int]:
    """Which calls of these names (all) to fail at: of a loop's rounds, with the same two calls
    before and the same one after, the first."""
    first: dict[tuple[str, ...], int] = {}
    for i, name in enumerate(calls):
        if not of or name in of:
            first.setdefault(tuple(calls[max(0, i - 2) : i + 2]), i)
    return list(first.values())


def resumed(job: Job, whole: Whole) -> None:
    if job.out.exists():
        same_but_for_the_control_folder = content(job.out)
        assert same_but_for_the_control_folder == whole.content
    done(job)
    same(job.out, whole.content)


# ---- kill -9 ---------------------------------------------------------------------------------


def test_killed_before_each_call_that_changes_the_disk(models: list[Path], tmp_path: Path) -> None:
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out"))
    commit = whole.calls[-20:]
    assert {"fsync", "unlink"} & set(commit)
    assert {"rename", "replace"} & set(commit)
    for k in places(whole.calls):
        job = sliced.job(models, tmp_path / f"{k}" / "out")
        assert run(job, Fault(kill, k)).code == KILLED, (k, whole.calls[k])
        resumed(job, whole)


def test_killed_in_the_middle_of_each_write(models: list[Path], tmp_path: Path) -> None:
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out"))
    writes = [i for i, name in enumerate(whole.calls) if name in SHIFTS]
    assert len(writes) > 20
    for k in map(writes.index, places(whole.calls, SHIFTS)):
        job = sliced.job(models, tmp_path / f"{k}" / "out")
        assert run(job, Fault(tear, k, SHIFTS)).code == KILLED
        resumed(job, whole)


@pytest.mark.parametrize("method", sliced.METHODS)
def test_killed_at_random_moments(models: list[Path], tmp_path: Path, method: str) -> None:
    """From outside, wherever each thread is; and killed again while it resumes."""
    start = time.perf_counter()
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out", method))
    lasted = time.perf_counter() - start
    rng = random.Random(method)
    for i in range(6):
        job = sliced.job(models, tmp_path / f"{i}" / "out", method)
        for _ in range(rng.randrange(1, 4)):
            child = Run(job)
            time.sleep(rng.uniform(0, lasted))
            child.process.kill()
            child.end()
        resumed(job, whole)


def test_killed_again_and_again(models: list[Path], tmp_path: Path) -> None:
    """Each attempt gets some calls further than the one before, and one of them to the end."""
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out"))
    job = sliced.job(models, tmp_path / "out")
    for attempt in range(len(whole.calls)):
        end = run(job, Fault(kill, 4 + 3 * attempt))
        if end.code != KILLED:
            break
    assert (end.code, end.error) == (0, "")
    assert attempt > 5
    same(job.out, whole.content)


def test_power_loss(models: list[Path], tmp_path: Path) -> None:
    """What was not synced may be gone, while the journal of it is there."""
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out"))
    for k in range(0, len(whole.calls), 9):
        job = sliced.job(models, tmp_path / f"{k}" / "out")
        run(job, Fault(kill, k))
        for path in control(job.out).rglob("*.safetensors"):
            path.write_bytes(bytes(path.stat().st_size))
        resumed(job, whole)


def test_an_interrupt_leaves_what_can_be_resumed(models: list[Path], tmp_path: Path) -> None:
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out"))
    writes = [i for i, name in enumerate(whole.calls) if name in SHIFTS]
    for k in (*writes[5::9], len(whole.calls) - 8):
        job = sliced.job(models, tmp_path / f"{k}" / "out")
        end = run(job, Fault(interrupt, k))
        assert (end.code, end.error) == (0, "interrupted")
        assert not job.out.exists()
        assert control(job.out).is_dir()
        resumed(job, whole)


# ---- the disk refuses ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_every_write_from_one_on(
    models: list[Path], tmp_path: Path, number: int
) -> None:
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out"))
    writes = sum(name in WRITES for name in whole.calls)
    for k in range(0, writes, 4):
        job = sliced.job(models, tmp_path / f"{k}" / "out")
        end = run(job, Fault(refuse(number), k, WRITES, lasting=True))
        assert end.code == 0
        assert str(job.out) in end.error
        assert errno_text(number) in end.error
        assert "\n" not in end.error
        assert not job.out.exists()
        resumed(job, whole)


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "open", "ftruncate"])
def test_one_refusal_of_any_other_call(models: list[Path], tmp_path: Path, call: str) -> None:
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out"))
    calls = [i for i, name in enumerate(whole.calls) if name == call]
    for k in map(calls.index, places(whole.calls, (call,))):
        job = sliced.job(models, tmp_path / f"{k}" / "out")
        end = run(job, Fault(refuse(errno.EIO), k, (call,)))
        assert end.code == 0, (call, k)
        if job.out.exists():  # what failed came after the output had its name
            assert content(job.out) == whole.content
        else:
            assert errno_text(errno.EIO) in end.error
        resumed(job, whole)


def errno_text(number: int) -> str:
    return {
        errno.ENOSPC: "No space left on device",
        errno.EDQUOT: "Disk quota exceeded",
        errno.EIO: "Input/output error",
    }[number]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(where)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system in memory cannot be mounted here")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_disk_that_is_filled_by_others_meanwhile(
    models: list[Path], tmp_path: Path, small_disk: Path
) -> None:
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out"))
    full = 0
    for k in range(1, len(whole.calls), 6):
        job = sliced.job(models, small_disk / f"{k}" / "out")
        job.out.parent.mkdir()
        others = small_disk / "others"
        end = run(job, Fault(fill(others), k))
        assert end.code == 0
        if end.error:
            full += 1
            told = (errno_text(errno.ENOSPC), "the disk has 0.00 GB")
            assert any(text in end.error for text in told)
            assert not job.out.exists()
        others.unlink(missing_ok=True)
        resumed(job, whole)
        shutil.rmtree(job.out.parent)  # the disk has no room for the results of all
    assert full > 3


# ---- the inputs fail -------------------------------------------------------------------------


def test_an_input_that_cannot_be_read(models: list[Path], tmp_path: Path) -> None:
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out"))
    for k in (0, 3, 11, 30, 50):
        job = sliced.job(models, tmp_path / f"{k}" / "out")
        end = run(job, Fault(refuse(errno.EIO), k, READS, lasting=True))
        assert end.code == 0
        assert errno_text(errno.EIO) in end.error
        assert any(str(model) in end.error for model in models)
        assert not job.out.exists()
        resumed(job, whole)


def reads(models: list[Path], tmp_path: Path) -> int:
    """How often a run reads its inputs."""
    count = len(done(sliced.job(models, tmp_path / "read" / "out"), Fault(kill, -1, READS)).calls)
    assert count > 50
    return count


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.7])
@pytest.mark.parametrize("left", [0, 100, 0.5])
def test_an_input_cut_off_while_it_is_read(tmp_path: Path, share: float, left: float) -> None:
    models = sliced.write_models(tmp_path / "models")
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out"))
    job = sliced.job(models, tmp_path / "out")
    at = int(share * reads(models, tmp_path))
    victim = models[1] / "model.safetensors"
    before = victim.read_bytes()
    size = int(len(before) * left) if left < 1 else int(left)
    end = run(job, Fault(shorten(victim, size), at, READS))
    assert end.code == 0, end
    assert str(victim) in end.error
    assert "\n" not in end.error
    assert not job.out.exists()
    again = run(job)
    assert str(victim) in again.error
    assert not job.out.exists()
    victim.write_bytes(before)
    resumed(job, whole)


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("place", [0.5, 0.9])
def test_an_input_written_to_while_it_is_read(tmp_path: Path, share: float, place: float) -> None:
    """Before the place is read, or after: what comes out would be of both."""
    models = sliced.write_models(tmp_path / "models")
    whole = Whole(sliced.job(models, tmp_path / "whole" / "out"))
    job = sliced.job(models, tmp_path / "out")
    at = int(share * reads(models, tmp_path))
    victim = models[1] / "model.safetensors"
    before = victim.read_bytes()
    end = run(job, Fault(overwrite(victim, int(place * len(before))), at, READS))
    assert str(victim) in end.error
    assert not job.out.exists()
    victim.write_bytes(before)
    again = run(job)
    if again.error:  # some of what was written had been merged
        assert str(victim) in again.error
        done(job.given(resume=False))
    same(job.out, whole.content)
