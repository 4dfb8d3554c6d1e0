"""Models of the hub: what is downloaded, pinned and recorded; what is said where it cannot be."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekern import CheckpointError, merge_checkpoints
from mergekern.engine import hub
from mergekern.engine.checkpoint import Checkpoint
from mergekern.engine.verify import verify

from accuracy import assert_bytes_equal
from engine.models import linear, python, read_folder, tensors, write_file, write_folder

huggingface_hub = pytest.importorskip("huggingface_hub", reason="optional dependency")

COMMIT, LATER = "0123456789abcdef" * 2, "f" * 40


class StubHub:
    """Repositories as folders, downloaded as `snapshot_download` does it: links to blobs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[tuple[str, str], Path] = {}  # repository and commit
        self.branches = {"main": COMMIT}
        self.calls: list[tuple[str, str | None]] = []

    def download(self, repository: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        self.calls.append((repository, revision))
        commit = self.branches.get(revision or "main", revision or "")
        if (repository, commit) not in self.files:
            raise FileNotFoundError(f"404 for {repository}.\nRepository Not Found. Log in.")
        cache = self.root / "cache" / f"models--{repository.replace('/', '--')}"
        snapshot = cache / "snapshots" / commit
        (cache / "blobs").mkdir(parents=True, exist_ok=True)
        source = self.files[repository, commit]
        for i, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
            name = path.relative_to(source)
            if any(fnmatch.fnmatch(name.as_posix(), p) for p in ignore_patterns):
                continue
            blob, link = cache / "blobs" / f"{commit}{i}", snapshot / name
            blob.write_bytes(path.read_bytes())
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubHub:
    stub = StubHub(tmp_path / "stub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stub.download)
    monkeypatch.chdir(tmp_path)
    return stub


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# ---- what is downloaded ------------------------------------------------------------------------


def test_all_but_pickles_and_other_runtimes(stub: StubHub, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "a", tensors(), shards=2)
    wanted = names(source) | {"tokenizer.model", "odd/vocab.tiktoken", "2_Dense/pytorch_model.bin"}
    write_file(source / "2_Dense" / "pytorch_model.bin", {"linear.weight": torch.ones(2)})
    others = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.onnx", "tf_model.h5"]
    others += ["onnx/config.json", "x/onnx/config.json", "flax_model.msgpack", "last.ckpt"]
    for name in [*others, "tokenizer.model", "odd/vocab.tiktoken"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    stub.files["org/m", COMMIT] = source
    path, commit = hub.local("org/m")
    assert (names(path), commit) == (wanted, COMMIT)
    assert stub.calls == [("org/m", None)]
    assert set(Checkpoint("org/m").signatures) == {*tensors(), "2_Dense/linear.weight"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "open_clip_pytorch_model.bin"])
def test_pickles_where_there_is_nothing_else(stub: StubHub, tmp_path: Path, name: str) -> None:
    write_file(tmp_path / "a" / name, tensors())
    stub.files["org/m", COMMIT] = tmp_path / "a"
    found = Checkpoint("org/m@main")
    assert found.commit == COMMIT
    for key, x in tensors().items():
        assert_bytes_equal(found.read(key), x)
    # The second download is of the very commit of the first, whatever `main` is by then.
    assert stub.calls == [("org/m", "main"), ("org/m", COMMIT)]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("org/m", ("org/m", None)),
        ("org/m@v1.0", ("org/m", "v1.0")),
        ("org/m@refs/pr/3", ("org/m", "refs/pr/3")),
        (f"o-r.g_1/M-2.b_c@{COMMIT}", ("o-r.g_1/M-2.b_c", COMMIT)),
    ],
)
def test_names_of_models(stub: StubHub, name: str, call: tuple[str, str | None]) -> None:
    with pytest.raises(CheckpointError, match="the hub does not give it"):
        Checkpoint(name)
    assert stub.calls == [call]


PATHS = ["m", "./org/m", "/org/m", "../org/m", "org/m/x", "org/", "org/m@", "a b/m", "org/m\n", ""]


@pytest.mark.parametrize("path", [*PATHS, "ö/m", "org//m", "~/m", "C:\\m", "org/m@a@b"])
def test_paths_are_not_asked_for(stub: StubHub, path: str) -> None:
    with pytest.raises(CheckpointError):
        Checkpoint(path)
    assert stub.calls == []


def test_a_folder_of_that_name_goes_first(stub: StubHub, tmp_path: Path) -> None:
    write_folder(tmp_path / "org" / "m", tensors(1))
    stub.files["org/m", COMMIT] = write_folder(tmp_path / "a", tensors(0))
    found = Checkpoint("org/m")
    assert (found.commit, stub.calls) == (None, [])
    assert_bytes_equal(found.read("head.weight"), tensors(1)["head.weight"])


# ---- merges ------------------------------------------------------------------------------------


def test_a_merge_records_the_commits_and_is_verified_against_them(
    stub: StubHub, tmp_path: Path
) -> None:
    for i, model in enumerate(("org/a", "org/b")):
        stub.files[model, COMMIT] = write_folder(tmp_path / str(i), tensors(i))
        stub.files[model, LATER] = write_folder(tmp_path / f"later{i}", tensors(i + 5))
    local = write_folder(tmp_path / "c", tensors(2))
    config = linear(Path("org/a"), Path("org/b@main"), local)
    merge_checkpoints(config, tmp_path / "out", progress=False)
    about = json.loads((tmp_path / "out" / "mergekern_manifest.json").read_text())
    models = [(m["path"], m["commit"]) for m in about["models"]]
    assert models == [("org/a", COMMIT), ("org/b@main", COMMIT), (str(local), None)]
    paths = [tmp_path / "0", tmp_path / "1", local]
    merge_checkpoints(linear(*paths), tmp_path / "plain", progress=False)
    for key, x in read_folder(tmp_path / "plain").items():
        assert_bytes_equal(read_folder(tmp_path / "out")[key], x)

    stub.branches["main"] = LATER  # the models have moved on; what was merged has not
    stub.calls.clear()
    found = verify(tmp_path / "out", inputs=True, replay=["*"], progress=False)
    assert found.problems == ()
    assert found.replayed == len(tensors())
    assert stub.calls
    assert {revision for _, revision in stub.calls} == {COMMIT}


# ---- refusals ----------------------------------------------------------------------------------


def test_what_the_hub_says_is_one_line(stub: StubHub) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint("org/none@v2")
    assert str(caught.value) == (
        "org/none@v2: no such file or folder, and the hub does not give it (FileNotFoundError: 404 "
        "for org/none); check the name, the network, HF_HUB_OFFLINE and the login of a gated "
        "model, or give the path of a copy"
    )


def _gated(errors: Any) -> Exception:
    class Response:
        headers: dict[str, str] = {}  # noqa: RUF012
        request = None
        status_code = 403

    return errors.GatedRepoError("Access to model org/m is restricted.", response=Response())


FAILURES: list[Callable[[Any], Exception]] = [
    _gated,
    lambda e: e.LocalEntryNotFoundError("not in the cache"),
    lambda e: e.OfflineModeIsEnabled("offline"),
    lambda e: e.HFValidationError("bad name"),
    lambda e: e.HTTPError("reset"),
    lambda e: ConnectionError("reset"),
    lambda e: OSError(28, "No space left on device"),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_every_failure_of_a_download(
    monkeypatch: pytest.MonkeyPatch, failure: Callable[[Any], Exception]
) -> None:
    from huggingface_hub import errors

    error = failure(errors)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=type(error).__name__):
        Checkpoint("org/m")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint("org/m")
    assert str(caught.value) == (
        "org/m: no such file or folder; to download it from the hub, pip install 'mergekern[hub]'"
    )


def test_offline_as_it_is(tmp_path: Path) -> None:
    """The real library, told that there is no network: one sentence, and no waiting."""
    code = """
import sys
from mergekern import CheckpointError
from mergekern.engine.checkpoint import Checkpoint
try:
    Checkpoint("google/vit-base-patch16-224@main")
except CheckpointError as error:
    print(error)
"""
    done = python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "google/vit-base-patch16-224@main: no such file or folder, and the hub does not give it ("
    )
    assert "HF_HUB_OFFLINE" in done.stdout
    assert done.stdout.count("\n") == 1
