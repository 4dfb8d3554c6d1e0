"""The same bytes, however the work is divided."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mergekern import dispatch

from accuracy import assert_bytes_equal
from engine import sliced
from engine.faults import Job, content, done
from engine.models import read_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sliced.write_models(tmp_path_factory.mktemp("models"))


def made(job: Job) -> dict[str, bytes]:
    done(job)
    return content(job.out)


@pytest.mark.parametrize("method", sliced.METHODS)
def test_of_any_number_of_threads_and_any_memory(
    models: list[Path], tmp_path: Path, method: str
) -> None:
    plain = sliced.job(models, tmp_path / "plain" / "out", method)
    want = made(plain)
    for threads in (2, 4):
        out = tmp_path / f"{threads}" / "out"
        assert made(replace(plain, out=out, threads=threads)) == want
    for memory in ("256MiB", "1GiB", "8GiB"):
        job = replace(plain, out=tmp_path / memory / "out", threads=2)
        assert made(job.given(memory=memory)) == want


@pytest.mark.parametrize("method", sliced.METHODS)
def test_of_a_window_that_holds_few_slices(models: list[Path], tmp_path: Path, method: str) -> None:
    """Tensors that the memory does not hold whole, where the method can be cut."""
    larger = sliced.write_models(tmp_path / "larger", size=40)
    job = sliced.job(larger, tmp_path / "wide" / "out", method, memory="1GiB")
    want = made(job)
    whole = max(x.nbytes for x in sliced.tensors(0, 40).values())
    if method not in ("della", "dare_ties of mergekit"):  # which need rows, and tensors, whole
        assert made(replace(job, out=tmp_path / "narrow" / "out").given(memory=whole)) == want


@pytest.mark.parametrize("method", sliced.METHODS)
def test_of_every_backend(models: list[Path], tmp_path: Path, method: str) -> None:
    weights = {}
    for backend in ("torch", "cpu"):
        if reason := dispatch.why_not(backend, "weighted_sum", "cpu"):
            pytest.skip(reason)
        job = sliced.job(models, tmp_path / backend / "out", method, backend=backend)
        done(job)
        weights[backend] = read_folder(job.out)
    for key, x in weights["torch"].items():
        assert_bytes_equal(weights["cpu"][key], x)


@pytest.mark.parametrize("method", sliced.METHODS)
def test_in_one_file_or_in_many(models: list[Path], tmp_path: Path, method: str) -> None:
    want = None
    for size in ("1GB", "20KB", "1KB"):
        job = sliced.job(models, tmp_path / size / "out", method, shard_size=size)
        done(job)
        got = read_folder(job.out)
        assert (job.out / "model.safetensors").exists() == (size == "1GB")
        for key, x in (want or got).items():
            assert_bytes_equal(got[key], x)
        want = got


def test_two_runs_are_the_same_to_the_last_file(models: list[Path], tmp_path: Path) -> None:
    """No time, no path of the output and no order of threads is in them."""
    first = made(sliced.job(models, tmp_path / "first" / "out"))
    assert made(sliced.job(models, tmp_path / "second" / "named otherwise")) == first
    text = first["mergekern_manifest.json"].decode()
    assert json.loads(text)
    assert str(tmp_path) not in text.replace(str(models[0].parent), "")
