"""Merges of several ranks: the bytes of one process, whoever dies on the way."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, TCPStore

import mergekern as mk
from mergekern.engine import ranks as engine_ranks
from mergekern.engine import units
from mergekern.engine.control import control_folder
from mergekern.engine.journal import read_journals
from mergekern.engine.output import Output
from mergekern.engine.progress import Bar
from mergekern.engine.ranks import ALONE, SILENCE, _Joined, is_first, joined, label, own_device
from mergekern.engine.studies import FOLDER
from mergekern.errors import CheckpointError, RankError
from mergekern.methods import slices

from engine import jobs
from engine.models import can_go_on, ties, write_folder
from refusal import refused

CUT = 1000
SHARD = 9000  # bytes of an output file, where there are several


def content(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of several slices, of one, of none, a buffer; few magnitudes, so that they tie."""
    g = torch.Generator().manual_seed(seed)
    made = {
        "ids": torch.arange(2500)[None],
        "empty": torch.zeros(0, 3),
        "scale": torch.tensor(1.5),
    }
    for i in range(5):
        w = torch.randint(-9, 10, (37 + i, 101), generator=g) / 8
        made[f"layer.{i}.weight"] = w.to(torch.bfloat16 if i % 2 else torch.float32)
        made[f"layer.{i}.bias"] = torch.randn(50, generator=g)
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [write_folder(folder / f"m{i}", content(i), shards=1 + i) for i in range(3)]


@pytest.fixture(autouse=True)
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the oracle, one process, is cut by."""
    monkeypatch.setattr(slices, "SLICE", CUT)


def write_config(path: Path, models: list[Path], method: str = "ties", **parameters: Any) -> Path:
    path.write_text(json.dumps(ties(*models, method=method, **{"density": 0.3, **parameters})))
    return path


def files(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def assert_same_files(got: Path, expected: Path) -> None:
    a, b = files(got), files(expected)
    assert a.keys() == b.keys()
    assert not [name for name in a if a[name] != b[name]]


def merged(config: Path, out: Path, **options: Any) -> Path:
    """By this process alone."""
    mk.merge_checkpoints(config, out, progress=False, **options)
    return out


def assert_all_well(ended: list[jobs.Ended]) -> None:
    assert [each.code for each in ended] == [0] * len(ended), ended
    assert not any(each.err for each in ended[1:]), ended  # progress is rank 0's


# ---- the same bytes --------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_do_not_depend_on_ranks(models: list[Path], tmp_path: Path, ranks: int) -> None:
    """Measured, counted over the whole model, at random; one file and several, and a sweep."""
    theirs, ours = tmp_path / "ranks", tmp_path / "alone"  # statistics lie beside the output
    cases: dict[str, tuple[Path, dict[str, Any]]] = {}
    acts: list[Callable[[], int]] = []
    for method in ("ties", "ties_global", "dare_ties", "karcher"):
        config = write_config(tmp_path / f"{method}.yml", models, method)
        if method == "karcher":
            plain = {"merge_method": method, "models": [{"model": str(m)} for m in models]}
            config.write_text(json.dumps(plain))
        for size in ("5GB", str(SHARD)):
            name = f"{method}-{size}"
            acts.append(partial(jobs.merge, config, theirs / name, "--shard-size", size))
            cases[name] = config, {"shard_size": size}
    swept = tmp_path / "ties_global.yml"
    name = "ties_global-other-lambda"  # for which the statistics are those of before
    other = write_config(tmp_path / "other.yml", models, "ties_global", **{"lambda": 0.5})
    acts.append(partial(jobs.merge, other, theirs / name))
    cases[name] = other, {}
    acts.append(partial(jobs.merge, swept, theirs / "report", "--report", "html"))
    cases["report"] = swept, {"report": "html"}
    values = {"density": [0.2, 0.7]}
    acts.append(partial(jobs.sweep, swept, theirs / "sweep", values))
    act = partial(jobs.cut_at, CUT, partial(jobs.in_turn, acts))
    with jobs.started(ranks, act, tmp_path / "logs") as job:
        ended = job.wait()
    assert_all_well(ended)
    assert len(ended[0].out.splitlines()) == len(cases)
    assert not any(each.out for each in ended[1:])
    for name, (config, options) in cases.items():
        assert_same_files(theirs / name, merged(config, ours / name, **options))
    mk.merge_sweep(swept, ours / "sweep", values, progress=False)
    assert_same_files(theirs / "sweep", ours / "sweep")
    assert {p.name for p in theirs.iterdir()} == {*cases, "sweep", FOLDER}
    assert_same_files(theirs / FOLDER, ours / FOLDER)
    assert files(theirs / FOLDER)


# ---- ranks that die --------------------------------------------------------------------------


@pytest.fixture
def oracle(models: list[Path], tmp_path: Path) -> tuple[Path, Path]:
    """A configuration, and what one process makes of it."""
    config = write_config(tmp_path / "config.yml", models)
    return config, merged(config, tmp_path / "alone" / "out")


def broken(
    config: Path, out: Path, what: Callable[[int], None], silence: float = 30
) -> Callable[[], int]:
    """A merge in whose rank 1 `what` happens."""
    act: Callable[[], int] = partial(jobs.merge, config, out)
    act = partial(jobs.of_rank, {1: partial(jobs.writing, what, act)}, act)
    return partial(jobs.cut_at, CUT, partial(jobs.listening, silence, act))


def test_any_number_of_ranks_goes_on_after_a_kill(
    oracle: tuple[Path, Path], tmp_path: Path
) -> None:
    config, expected = oracle
    out = tmp_path / "theirs" / "out"
    act = broken(config, out, partial(jobs.die_at, 3))
    with jobs.started(2, act, tmp_path / "logs") as job:
        ended = job.wait()
    assert ended[1].code == -signal.SIGKILL
    assert all(each.code for each in ended)
    assert can_go_on(out.parent, "out")
    entries = read_journals(control_folder(out))[1]
    assert 3 <= len(entries) < 32  # rank 1's, if no others, and not all

    again = tmp_path / "again"
    shutil.copytree(out.parent, again)
    manifest = mk.merge_checkpoints(config, out, progress=False)
    assert 0 < manifest.bytes_read < sum(x.nbytes for i in range(3) for x in content(i).values())
    assert_same_files(out, expected)
    act = partial(jobs.cut_at, CUT, partial(jobs.merge, config, again / "out"))
    with jobs.started(3, act, tmp_path / "logs") as job:
        assert_all_well(job.wait())
    assert_same_files(again / "out", expected)
    assert {p.name for p in again.iterdir()} <= {"out", FOLDER}


def test_ranks_that_nobody_ends_find_out(oracle: tuple[Path, Path], tmp_path: Path) -> None:
    """Without torchrun: one line each, once they need the rank that is dead."""
    config, expected = oracle
    out = tmp_path / "theirs" / "out"
    act = broken(config, out, partial(jobs.die_at, 1), silence=5)
    with jobs.started(2, act, tmp_path / "logs") as job:
        ended = job.wait(stop_others=False)
    assert [each.code for each in ended] == [2, -signal.SIGKILL]
    assert "mergekern: rank 0: rank 1 has given no sign of life for 5 s" in ended[0].err
    assert can_go_on(out.parent, "out")
    assert_same_files(merged(config, out), expected)


def test_an_error_in_one_rank_ends_all(oracle: tuple[Path, Path], tmp_path: Path) -> None:
    config, expected = oracle
    out = tmp_path / "theirs" / "out"
    act = broken(config, out, partial(jobs.fail_at, 2))
    with jobs.started(3, act, tmp_path / "logs") as job:
        ended = job.wait(stop_others=False)
    assert [each.code for each in ended] == [2, 2, 2]
    full = f"mergekern: rank 1: {out}: writing failed (No space left on device)"
    assert full in ended[1].err.splitlines()
    for rank in (0, 2):
        *_, line = ended[rank].err.splitlines()
        assert line == (
            f"mergekern: rank {rank}: rank 1 has failed, and this one stops: its own line says why"
        )
    assert can_go_on(out.parent, "out")
    assert_same_files(merged(config, out), expected)


def test_a_second_job_waits_for_the_last_rank(oracle: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever becomes of rank 0, who made the folder."""
    config, expected = oracle
    out = tmp_path / "theirs" / "out"
    act = partial(jobs.merge, config, out)
    begun, told = [tmp_path / f"begun.{rank}" for rank in (0, 1)], tmp_path / "told"
    holding = {
        rank: partial(jobs.writing, partial(jobs.hold, begun[rank], until), act)
        for rank, until in ((0, told), (1, tmp_path / "never"))
    }

    def is_refused() -> None:
        for resume in (True, False):
            with pytest.raises(CheckpointError, match="another process is writing it"):
                merged(config, out, resume=resume)

    act = partial(jobs.cut_at, CUT, partial(jobs.of_rank, holding, act))
    with jobs.started(2, act, tmp_path / "logs") as job:
        while not all(path.exists() for path in begun):
            assert all(p.is_alive() for p in job.processes)
            time.sleep(0.01)
        is_refused()
        told.touch()
        job.processes[0].join()
        is_refused()
    assert_same_files(merged(config, out), expected)


# ---- refusals --------------------------------------------------------------------------------


def test_ranks_that_cannot_share_are_refused(models: list[Path], tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yml", models)
    dare = write_config(tmp_path / "dare.yml", models, "dare_ties")
    stale = tmp_path / "stale" / "out"
    control_folder(stale).mkdir(parents=True)
    (control_folder(stale) / "lock").write_text("of another time")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    acts = [
        partial(jobs.merge, dare, tmp_path / "out", "--host", "mergekit"),
        partial(
            jobs.of_rank,
            {1: partial(jobs.merge, config, tmp_path / "out", "--seed", 1)},
            partial(jobs.merge, config, tmp_path / "out"),
        ),
        *(
            partial(
                jobs.of_rank,
                {1: partial(jobs.merge, config, place)},
                partial(jobs.merge, config, tmp_path / "out"),
            )
            for place in (tmp_path / "elsewhere" / "out", stale)
        ),
        partial(jobs.merge, config, tmp_path / "there"),
    ]
    act = partial(jobs.cut_at, CUT, partial(jobs.in_turn, acts))
    with jobs.started(2, act, tmp_path / "logs") as job:
        ended = job.wait(stop_others=False)
    lines = [[line for line in e.err.splitlines() if "merging:" not in line] for e in ended]
    for rank in (0, 1):
        named = f"mergekern: rank {rank}: "
        draws = "host 'mergekit' draws masks for one tensor after the other; got 2 ranks; expected"
        assert lines[rank][0].startswith(f"{named}dare_ties: {draws}")
        assert lines[rank][1].startswith(f"{named}ranks: rank 1 has another plan than rank 0; got ")
    for i, place in ((2, tmp_path / "elsewhere" / "out"), (3, stale)):
        unseen = f"{place}: what rank 0 has made there is not seen here"
        assert lines[1][i].startswith(f"mergekern: rank 1: {unseen}")
        assert lines[0][i].startswith("mergekern: rank 0: rank 1 has failed")
    assert lines[0][4].startswith(f"mergekern: rank 0: {tmp_path / 'there'}: output exists already")
    assert lines[1][4].startswith("mergekern: rank 1: rank 0 has failed")
    assert [len(each) for each in lines] == [5, 5]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_masks_drawn_tensor_by_tensor_are_drawn_anew(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "dare.yml", models, "dare_ties")
    expected = merged(config, tmp_path / "alone" / "out", host="mergekit")
    real, calls = Output.write, [0]

    def write(*a: Any) -> None:
        jobs.fail_at(8, calls[0])  # masks have been drawn
        calls[0] += 1
        real(*a)

    out = tmp_path / "theirs" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", write)
        patch.setattr(units, "_BATCH", 0)
        with pytest.raises(CheckpointError, match="writing failed"):
            merged(config, out, host="mergekit")
    assert can_go_on(out.parent, "out")
    assert_same_files(merged(config, out, host="mergekit"), expected)


# ---- ranks themselves ------------------------------------------------------------------------


def pair() -> list[_Joined]:
    """Two ranks of one store, in this process: all but the exchange itself."""
    store = HashStore()
    ranks = [_Joined(store, None, rank, 2) for rank in (0, 1)]
    for each in ranks:
        store.set(f"alive/{each.rank}", "0 0 0")
    return ranks


def test_a_slow_rank_is_waited_for_and_a_silent_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(engine_ranks.time, "monotonic", lambda: now[0])
    first, second = pair()
    for beat in range(10):
        second._store.set("alive/1", f"{beat} 0 0")
        first._listen(1)
        now[0] += 0.9 * SILENCE
        first._listen(1)
    now[0] += 0.2 * SILENCE
    with pytest.raises(RankError, match="rank 1 has given no sign of life for 30 s"):
        first._listen(1)


def test_the_bar_of_rank_0_is_that_of_all() -> None:
    ranks, bars, ended = pair(), [Bar(), Bar()], threading.Event()
    ended.set()  # one beat each
    for each, bar in zip(ranks, bars, strict=True):
        each.show(bar)
        bar.expect(100)
        bar.advance(10 + 20 * each.rank)
    for moved in (0, 15):
        bars[1].advance(moved)
        for each in reversed(ranks):
            each.pulse(ended)
        assert (bars[0].total, bars[0].done) == (200, 40 + moved)
    assert (bars[1].total, bars[1].done) == (100, 45)


def test_ranks_that_do_not_come_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ranks, "_JOIN", timedelta(seconds=1))
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in jobs.environment(2, store).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    match = "2 ranks, as WORLD_SIZE says, have not found each other"
    with pytest.raises(RankError, match=match), joined():
        pass


def test_only_who_asks_is_a_rank(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that torchrun started may merge by one of its processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    merged(write_config(tmp_path / "config.yml", models), tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined() as ranks:
        assert ranks is ALONE
        assert ranks.gather(7) == [7]
        assert ranks.lead(lambda: 8) == 8
    assert (is_first(), label(), own_device("cuda")) == (True, "", "cuda")
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (is_first(), label()) == (False, "rank 3: ")
    assert [own_device(d) for d in ("cpu", "cuda", "cuda:0")] == ["cpu", "cuda:1", "cuda:0"]
    monkeypatch.setenv("RANK", "one")
    with refused("RANK", "no number", "'one'"), joined():
        pass


# ---- torchrun --------------------------------------------------------------------------------

DIES = """
import os, signal, sys
from mergekern.engine.output import Output
if os.environ["RANK"] == "1":
    Output.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from mergekern.cli import main
main()
"""


def test_torchrun(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is killed: the job fails, at once; the command of the README goes on."""
    monkeypatch.undo()  # slices of the usual size
    config, out = write_config(tmp_path / "config.yml", models), tmp_path / "out"
    (tmp_path / "dies.py").write_text(DIES)

    def torchrun(*command: object) -> subprocess.CompletedProcess[str]:
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
        ]
        arguments = [*start, *map(str, command), "merge", str(config), str(out)]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=240)

    failed = torchrun(tmp_path / "dies.py")
    assert failed.returncode
    assert "exitcode  : -9" in failed.stderr
    assert not out.exists()
    done = torchrun("-m", "mergekern")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{out}: ties, 12 tensors merged")
    assert_same_files(out, merged(config, tmp_path / "alone" / "out"))
