"""mergekern zip: what zip_models gives, from files into a folder that is complete or not there."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.calls import Run, one_line
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mergekern as mk
from mergekern.align import picture
from mergekern.engine import zip as engine
from mergekern.engine.samples import Batches, Pixels, open_samples

from accuracy import assert_bytes_equal
from align.nets import Attention
from align.networks import CASES, Case, assert_same_output, cast, normal, planted
from align.networks import run as outputs_of
from engine.models import nothing_left

FACTORY = """
from neighbour import Net as net

class Nested:
    make = net

nothing = 3

def number():
    return nothing
"""
NEIGHBOUR = "from align.networks import Residual as Net\n"
SAMPLES = 30


def inputs_of(case: Case, count: int) -> dict[str, Tensor]:
    """Several batches of a case's inputs, as named arrays."""
    each = [cast(case.inputs(seed), torch.float32) for seed in range(20, 20 + count)]
    if isinstance(each[0], Tensor):
        return {"x": torch.cat(each)}
    return {name: torch.cat([x[name] for x in each]) for name in each[0]}


class Job:
    """Weights and samples of a case on disk, and the options that name them."""

    def __init__(self, root: Path, case: Case, models: list[nn.Module]) -> None:
        self.case, self.models = case, models
        self.weights = []
        for i, model in enumerate(models):
            self.weights.append(root / f"{i}.safetensors")
            state = {k: x.clone() for k, x in model.state_dict().items()}
            save_file(state, self.weights[-1])
        self.data = root / "data.npz"
        inputs = {k: x.numpy() for k, x in inputs_of(self.case, SAMPLES).items()}
        np.savez(self.data, label=np.zeros(len(next(iter(inputs.values())))), **inputs)
        self.out = root / "out"
        self.model = f"{case.network.__module__}:{case.network.__name__}"
        self.options = ["--model", self.model, "--data", self.data, "--no-picture"]

    def batches(self, size: int = 64, limit: int | None = None, seed: int = 0) -> Batches:
        samples = open_samples(self.data, ["x"], torch.float32, Pixels(), None)
        return Batches(samples, size, limit, seed, "cpu")

    def state(self) -> dict[str, Tensor]:
        return load_file(self.out / "model.safetensors")

    def about(self) -> dict[str, Any]:
        return json.loads((self.out / "zip.json").read_text())


def unrelated(root: Path, name: str, n: int = 2) -> Job:
    return Job(root, CASES[name], [CASES[name].model(i) for i in range(n)])


def reordered(root: Path, name: str, n: int = 2) -> Job:
    return Job(root, CASES[name], planted(CASES[name], n, torch.float32)[0])


def assert_same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert_bytes_equal(got[name], x)


# ---- what it computes ------------------------------------------------------------------------


@pytest.mark.parametrize("until", [None, "first"])
@pytest.mark.parametrize(
    ("name", "method"),
    [("mlp", "zip"), ("residual", "zip"), ("residual", "permute"), ("mlp", "weights")],
)
def test_it_is_zip_models(
    run: Run, tmp_path: Path, name: str, method: str, until: str | None
) -> None:
    job = unrelated(tmp_path, name, 3)
    spaces = mk.discover_spaces(job.models[0], next(iter(job.batches())))
    until = until and next(iter(spaces.movable))
    parameters = {"alpha": 0.1, "beta": 0.5} if method == "zip" else {}
    options = [f"--{k}={v}" for k, v in parameters.items()]
    options += ["--until", until] if until else []
    code, printed, errors = run(
        "zip", *job.options, "--out", job.out, "--method", method, *options, *job.weights
    )
    assert (code, errors) == (0, "")
    expected = mk.zip_models(job.models, job.batches(), method=method, until=until, **parameters)
    assert_same_state(job.state(), expected.state_dict())
    loaded = mk.load_zip(job.out, job.case.model(7))
    assert_same_state(loaded.state_dict(), expected.state_dict())
    assert isinstance(loaded, mk.PartialZip) is (until is not None)
    assert not loaded.training
    x = job.case.inputs(3)
    assert_same_output(outputs_of(loaded, x), outputs_of(expected, x))
    assert f"{job.out}: " in printed
    assert f"{len(job.batches().rows)} samples" in printed
    assert "not used: label" in printed


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_reorderings_are_undone(run: Run, tmp_path: Path, name: str) -> None:
    job = reordered(tmp_path, name)
    given = [*job.options, "--method", "permute", "--repair", "none"]
    given += ["--mask", "mask"] if name == "attention" else []
    assert run("zip", *given, "--out", job.out, *job.weights)[0] == 0
    assert_same_state(job.state(), job.models[0].state_dict())
    until = {"residual": "conv1", "attention": "fc1"}[name]
    out = tmp_path / "partial"
    code, printed, _ = run("zip", *given, "--out", out, "--until", until, *job.weights)
    assert code == 0
    assert f"mergekern.load_zip('{out}', model)" in printed
    partial = mk.load_zip(out, job.case.model(9))
    inputs = job.case.inputs(1)
    for model, output in zip(job.models, outputs_of(partial, inputs), strict=True):
        assert_same_output(output, outputs_of(model, inputs))


def test_heads_are_told_from_the_trunk(run: Run, tmp_path: Path) -> None:
    job = unrelated(tmp_path, "mlp")
    _, printed, _ = run("zip", *job.options, "--out", job.out, "--until", "a", *job.weights)
    merged = {name: space["merged"] for name, space in job.about()["spaces"].items()}
    assert merged == {"a": True, "b": False}
    assert "b (in the heads)" in printed
    assert "a (in the heads)" not in printed


def test_statistics_are_read_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = unrelated(tmp_path, "residual")
    file = tmp_path / "statistics.safetensors"
    given = ["zip", *job.options, "--statistics", file, *job.weights, "--out"]
    assert run(*given, tmp_path / "first", "--method", "permute")[0] == 0
    assert [p.name for p in tmp_path.iterdir() if "statistics" in p.name] == [file.name]
    monkeypatch.setattr(engine, "collect_statistics", lambda *_, **__: pytest.fail("collected"))
    assert run(*given, tmp_path / "second", "--method", "permute")[0] == 0
    assert run(*given, tmp_path / "third", "--method", "zip")[0] == 0
    files = [
        (tmp_path / n / "model.safetensors").read_bytes() for n in ("first", "second", "third")
    ]
    assert files[0] == files[1] != files[2]
    other = unrelated(tmp_path, "residual", 3)
    given[-3:] = [*other.weights[1:], "--out"]
    assert "not the one that statistics are of" in one_line(*run(*given, tmp_path / "fourth"))
    file.write_bytes(b"nothing")
    assert "no readable safetensors file" in one_line(*run(*given, tmp_path / "fourth"))


def test_tied_weights_under_one_name_or_all(run: Run, tmp_path: Path) -> None:
    """A checkpoint may leave out the second name of a tensor; the result has both."""
    job = reordered(tmp_path, "attention")
    for path in job.weights:
        state = load_file(path)
        del state["out.weight"]
        save_file(state, path)
    given = [*job.options, "--method", "permute", "--repair", "none", "--mask", "mask"]
    assert run("zip", *given, "--out", job.out, *job.weights)[0] == 0
    assert_same_state(job.state(), job.models[0].state_dict())


def test_a_factory_in_a_file_with_a_neighbour(run: Run, tmp_path: Path) -> None:
    job = unrelated(tmp_path, "residual")
    (tmp_path / "factory.py").write_text(FACTORY)
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    states = []
    for name in ("net", "Nested.make"):
        job.options[1] = f"{tmp_path / 'factory.py'}:{name}"
        job.out = tmp_path / name
        assert run("zip", *job.options, "--out", job.out, *job.weights)[0] == 0
        states.append(job.state())
    assert_same_state(*states)
    file = tmp_path / "factory.py"
    assert job.about()["sha256"][str(file)] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_weights_of_every_kind(run: Run, tmp_path: Path) -> None:
    """A pickle and a folder; files beside its weights come along, but not to a partial zip."""
    job = unrelated(tmp_path, "mlp")
    torch.save(job.models[1].state_dict(), tmp_path / "1.bin")
    folder = tmp_path / "folder"
    folder.mkdir()
    job.weights[0].rename(folder / "model.safetensors")
    for name in ("config.json", "README.md", "zip.png"):
        (folder / name).write_text('{"dtype": "float16"}')
    given = [*job.options, "--weights", folder, "--weights", tmp_path / "1.bin"]
    code, printed, _ = run("zip", *given, "--out", job.out)
    assert code == 0
    expected = mk.zip_models(job.models, job.batches())
    assert_same_state(job.state(), expected.state_dict())
    assert json.loads((job.out / "config.json").read_text())["dtype"] == "float32"
    assert "not used: label, README.md" in printed
    assert not (job.out / "zip.png").exists()  # the one of the folder shows another zip
    assert run("zip", *given, "--out", tmp_path / "partial", "--until", "a")[0] == 0
    assert sorted(p.name for p in (tmp_path / "partial").iterdir()) == [
        "labels.safetensors",
        "model.safetensors",
        "zip.json",
    ]


# ---- what it says ----------------------------------------------------------------------------


def test_the_manifest_and_the_table(run: Run, tmp_path: Path) -> None:
    job = unrelated(tmp_path, "mlp")
    given = [*job.options, "--limit", "40", "--batch-size", "16", "--seed", "3"]
    _, printed, _ = run("zip", *given, "--out", job.out, *job.weights)
    about = job.about()
    for path in job.weights:
        assert about["sha256"][str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert about["versions"]["mergekern"] == mk.__version__
    assert about["arguments"]["limit"] == about["samples"] == 40
    assert about["inputs"] == {"": {"dtype": "float32", "shape": [5]}}
    steps = ["load", "trace", "statistics", "match", "merge", "repair"]
    assert list(about["seconds"]) == steps
    read = job.batches(16, 40, 3)
    spaces = mk.discover_spaces(job.models[0], next(iter(read)))
    found = mk.match(mk.collect_statistics(job.models, read, spaces))
    rows = [line.split("│") for line in printed.splitlines() if line.startswith("│")]
    cells = {row[1].strip(): [c.strip() for c in row[2:-1]] for row in rows}
    assert cells.keys() == about["spaces"].keys() == spaces.movable.keys()
    for name, fit in found.correlations.items():
        size = str(spaces[name].size)
        shown = [f"{fit.before:.3f}", f"{fit.after:.3f}", f"{100 * fit.merged_within:.1f}"]
        assert cells[name] == [size, "1", *shown]
        assert about["spaces"][name]["after"] == fit.after
    for name, each in found.labels.items():
        for i, labels in enumerate(each):
            assert_bytes_equal(load_file(job.out / "labels.safetensors")[f"{name}/{i}"], labels)


def test_without_statistics_there_are_no_correlations(run: Run, tmp_path: Path) -> None:
    job = unrelated(tmp_path, "residual")
    code, printed, _ = run(
        "zip", *job.options, "--method", "weights", "--out", job.out, *job.weights
    )
    assert code == 0
    assert {s["after"] for s in job.about()["spaces"].values()} == {None}
    assert "statistics" not in job.about()["seconds"]
    assert "│      - │" in printed


def test_a_zip_of_a_transformer_is_said_to_be_approximate(run: Run, tmp_path: Path) -> None:
    case = Case(Attention, normal(4, 7, 5))
    job = Job(tmp_path, case, [case.model(i) for i in range(2)])
    for method in ("zip", "permute"):
        given = [*job.options, "--method", method, *job.weights, "--out", tmp_path / method]
        code, printed, errors = run("zip", *given)
        assert (code, errors) == (0, "")
        assert ("a zip is approximate: its features are multiplied" in printed) is (method == "zip")


def test_quiet_prints_nothing(run: Run, tmp_path: Path) -> None:
    job = unrelated(tmp_path, "mlp")
    assert run("zip", *job.options, "--out", job.out, *job.weights, "-q") == (0, "", "")


def test_a_dry_run_lists_the_spaces(run: Run, tmp_path: Path) -> None:
    job = unrelated(tmp_path, "mlp")
    code, printed, errors = run("zip", *job.options, "--dry-run")
    spaces = mk.discover_spaces(job.models[0], next(iter(job.batches())))
    assert (code, printed, errors) == (0, f"{spaces}\n", "")
    _, printed, _ = run("zip", *job.options, "--dry-run", "--outputs", "free")
    assert "is an output of the model" not in printed
    assert not job.out.exists()


# ---- the picture -----------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--until", "conv1"], ["--method", "weights"]])
def test_the_picture(run: Run, tmp_path: Path, more: list[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib: not installed")
    image = pytest.importorskip("PIL.Image", reason="pillow: not installed")
    job = unrelated(tmp_path, "residual")
    job.options[-1] = "--picture"
    assert run("zip", *job.options, "--out", job.out, *more, *job.weights)[0] == 0
    with image.open(job.out / "zip.png") as drawn:
        assert min(drawn.size) > 1000
        assert len(drawn.convert("RGB").getcolors(1 << 24)) > 100


def test_the_picture_shows_matched_features_on_the_diagonal(tmp_path: Path) -> None:
    models, _, _ = planted(CASES["mlp"], 2)
    case = CASES["mlp"]
    batches = [cast(case.inputs(seed), torch.float64) for seed in range(20)]
    stats = mk.collect_statistics(models, batches, case.traced(torch.float64))
    found = mk.match(stats, "permute")
    for name, labels in found.labels.items():
        block = stats.between(stats.correlation(name), 1)
        shown = picture._matched(block, labels)
        assert_bytes_equal(shown, block[:, labels[1].argsort()])
        assert shown.diagonal().min() > 0.99
        assert block.diagonal().min() < 0.99


def test_what_cannot_be_zipped_says_so(run: Run, tmp_path: Path) -> None:
    job = unrelated(tmp_path, "attention")
    errors = one_line(*run("zip", *job.options, "--out", job.out, *job.weights))
    assert "embed.weight cannot be zipped" in errors
    assert nothing_left(tmp_path, "out")


# ---- refusals --------------------------------------------------------------------------------


def test_refusals_are_one_line(run: Run, tmp_path: Path) -> None:
    job = unrelated(tmp_path, "mlp")
    (tmp_path / "factory.py").write_text(FACTORY)
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    (tmp_path / "half.npz").write_bytes(job.data.read_bytes()[:100])
    factory = tmp_path / "factory.py"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"--model": f"{factory}:nothing"}, "has no such factory; got 'nothing'"),
        ({"--model": f"{factory}:number"}, "makes no module; got int"),
        ({"--model": f"{factory}:absent.make"}, "has no such factory; got 'absent.make'"),
        ({"--model": f"{tmp_path}/absent.py:make"}, "no such file"),
        ({"--model": "absent.package:make"}, "no such module"),
        ({"--model": "bert-base"}, "download it first"),
        ({"--model": tmp_path / "there"}, "no config.json"),
        ({"--data": tmp_path / "none"}, "no such file or folder"),
        ({"--data": tmp_path / "there"}, "arrays or images"),
        ({"--data": tmp_path / "half.npz"}, "cannot be read"),
        ({"--until": "nowhere"}, "until is no space that moves; got 'nowhere'"),
        ({"--method": "guess"}, "method is unknown"),
        ({"--repair": "maybe"}, "repair is unknown"),
        ({"--outputs": "nowhere"}, "outputs names none"),
        ({"--alpha": "2"}, "alpha"),
        ({"--mask": "nowhere"}, "mask names no input"),
        ({"--mean": "a"}, "mean is no list"),
        ({"--size": "3"}, "size, mean and std are for images"),
        ({"--statistics": tmp_path / "none" / "file"}, "no folder for statistics"),
        ({"--batch-size": "0"}, "batch_size is too small"),
        ({"--limit": "0"}, "limit is too small"),
        ({"--device": "cuda:77"}, "device"),
        ({"--memory": "lots"}, "memory"),
        ({"--out": tmp_path / "there"}, "output exists already"),
    ]
    for changed, text in cases:
        options: dict[str, Any] = {"--model": job.model, "--data": job.data, "--out": job.out}
        flat = [x for pair in (options | changed).items() for x in pair]
        errors = one_line(*run("zip", *flat, "--no-picture", *job.weights))
        assert text in errors, errors
        assert errors.count("\n") == 1
        assert nothing_left(tmp_path, "out")
    for given, text in (
        ([*job.options, "--out", job.out, job.weights[0]], "nothing to zip"),
        ([*job.options, *job.weights], "there is no output"),
        ([*job.options, "--out", job.out, *job.weights, tmp_path / "none"], "no such file"),
    ):
        assert text in one_line(*run("zip", *given))
    assert nothing_left(tmp_path, "out")


def test_every_tensor_that_does_not_fit_is_listed(run: Run, tmp_path: Path) -> None:
    job = unrelated(tmp_path, "mlp")
    state = load_file(job.weights[1])
    del state["a.weight"], state["c.bias"]
    state["head.weight"] = torch.ones(2)
    state["b.weight"] = torch.ones(2, 3)
    state["b.bias"] = state["b.bias"].double()
    save_file(state, job.weights[1])
    errors = one_line(*run("zip", *job.options, "--out", job.out, *job.weights)).splitlines()
    assert errors[0].endswith(f"{job.weights[1]}: 5 tensors do not fit the model:")
    assert [line.strip() for line in errors[1:]] == [
        "a.weight: missing from the checkpoint",
        "b.bias: float64 would be rounded to float32",
        "b.weight: shape differs: [6, 8] in the model, [2, 3] in the checkpoint",
        "c.bias: missing from the checkpoint",
        "head.weight: missing from the model",
    ]
    assert nothing_left(tmp_path, "out")


def test_a_module_that_a_factory_needs_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "factory.py").write_text("import absent_package\n")
    job = unrelated(tmp_path, "mlp")
    job.options[1] = f"{tmp_path / 'factory.py'}:make"
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        run("zip", *job.options, "--out", job.out, *job.weights)


def test_matplotlib_is_asked_for_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = unrelated(tmp_path, "mlp")
    job.options.remove("--no-picture")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(engine, "Network", lambda *_: pytest.fail("work was done"))
    errors = one_line(*run("zip", *job.options, "--out", job.out, *job.weights))
    assert "matplotlib is not installed" in errors
    assert "pip install 'mergekern[picture]'" in errors
    assert nothing_left(tmp_path, "out")


@pytest.mark.parametrize("at", ["write_zip", "match"])
def test_an_interrupted_zip_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    job = unrelated(tmp_path, "mlp")
    real = getattr(engine, at)

    def interrupted(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, at, interrupted)
    assert run("zip", *job.options, "--out", job.out, *job.weights)[0] != 0
    assert nothing_left(tmp_path, "out")


# ---- load_zip --------------------------------------------------------------------------------


@pytest.mark.parametrize("until", [None, "a"])
def test_load_zip_refuses_another_model(run: Run, tmp_path: Path, until: str | None) -> None:
    job = unrelated(tmp_path, "mlp")
    more = ["--until", until] if until else []
    assert run("zip", *job.options, "--out", job.out, *more, *job.weights)[0] == 0
    wide = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
    with pytest.raises(mk.ArgumentError, match=r"load_zip: model (is of another|has other spaces)"):
        mk.load_zip(job.out, wide)
    before = {k: x.clone() for k, x in job.models[0].state_dict().items()}
    mk.load_zip(job.out, job.models[0])
    assert_same_state(job.models[0].state_dict(), before)
    with pytest.raises(mk.CheckpointError, match="holds no zip"):
        mk.load_zip(tmp_path, wide)
