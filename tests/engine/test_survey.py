"""Methods that read the whole model before they merge its first tensor: `Method.survey`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.engine.memory import OVERHEAD, Window
from mergekern.methods import REGISTRY, Inputs, Method, Parameter
from mergekern.methods.passes import Gather, Passes, Study
from mergekern.methods.registry import REQUIRED

from accuracy import assert_bits_equal, assert_bytes_equal
from engine.models import linear, read_folder, tensors, ties, write_folder


class Peaks:
    """Test method: each task vector over its largest magnitude in the whole model, in two passes.

    The second pass needs what the first found, and the merge what both found: for each model its
    largest |x - base| anywhere, and how often it occurs.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.arguments: list[dict[str, Any]] = []

    def passes(self, gather: Gather) -> Passes:
        """Of each model: the largest |x - base| anywhere, and how often it occurs."""
        largest: dict[int, float] = {}
        count: dict[int, int] = {}

        def measure(inputs: Inputs, **arguments: Any) -> None:
            assert inputs.survey is None
            self.seen.append(inputs.name)
            self.arguments.append(arguments)
            for model, size in self.magnitudes(inputs):
                largest[model] = max(largest.get(model, 0.0), float(size.max()))

        def occurrences(inputs: Inputs, *, weight: list[float]) -> None:
            self.seen.append(inputs.name)
            assert len(weight) == len(inputs.xs)
            for model, size in self.magnitudes(inputs):
                count[model] = count.get(model, 0) + int((size == largest[model]).sum())

        yield measure
        for theirs in gather(largest):
            for model, size in theirs.items():
                largest[model] = max(largest.get(model, 0.0), size)
        yield occurrences
        counts = gather(count)
        return {i: (size, sum(c.get(i, 0) for c in counts)) for i, size in largest.items()}

    @staticmethod
    def magnitudes(inputs: Inputs) -> list[tuple[int, Tensor]]:
        assert inputs.base is not None
        places = range(len(inputs.xs)) if inputs.models is None else inputs.models
        both = zip(places, inputs.xs, strict=True)
        return [(i, (x - inputs.base).abs()) for i, x in both if x.numel()]

    @staticmethod
    def merge(inputs: Inputs, *, weight: list[float]) -> Tensor:
        assert inputs.base is not None
        result = inputs.base.clone()
        places = range(len(inputs.xs)) if inputs.models is None else inputs.models
        for i, x, w in zip(places, inputs.xs, weight, strict=True):
            largest, count = inputs.survey[i]
            result += (x - inputs.base) * (w / (largest * count))
        return result.to(inputs.out_dtype)


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> Peaks:
    made = Peaks()
    parameters = (Parameter("weight", float, "model", REQUIRED, ""),)
    options = {"base": "required", "models": (1, None), "parameters": parameters}
    method = Method("peaks", "", merge=made.merge, survey=Study(made.passes), **options)
    monkeypatch.setitem(REGISTRY, "peaks", method)
    return made


def oracle(base: dict[str, Tensor], models: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The same from all tensors at once, models that lack one left out; weight 1."""
    result = {k: x.clone() for k, x in base.items()}
    for model in models:
        deltas = {k: x - base[k] for k, x in model.items() if x.dtype.is_floating_point}
        flat = torch.cat([d.reshape(-1).abs() for d in deltas.values()])
        factor = 1.0 / (float(flat.max()) * int((flat == flat.max()).sum()))
        for k, d in deltas.items():
            result[k] += d * factor
    return result


@pytest.fixture
def states() -> list[dict[str, Tensor]]:
    """A base and two models whose largest magnitude occurs twice, in different tensors."""
    made = [tensors(i) for i in range(3)]
    for i, model in enumerate(made[1:]):
        for key in ("head.weight", f"encoder.layer.{i + 1}.dense.bias"):
            made[0][key].view(-1)[1] = 1.0
            model[key].view(-1)[1] = 9.0 + i
    return made


def floating(state: dict[str, Tensor]) -> list[str]:
    return [k for k, x in state.items() if x.dtype.is_floating_point]


def test_state_dicts(peaks: Peaks, states: list[dict[str, Tensor]]) -> None:
    base, *models = states
    merged = mk.merge_state_dicts(models, "peaks", base=base, weight=1)
    for key, want in oracle(base, models).items():
        assert_bits_equal(merged[key], want)
    assert peaks.seen == floating(base) * 2
    assert peaks.arguments == [{"weight": [1.0, 1.0]}] * len(floating(base))


def test_one_tensor_is_surveyed_alone(peaks: Peaks) -> None:
    base, x = torch.tensor([1.0, 1.0]), torch.tensor([3.0, -1.0])
    merged = mk.merge_tensors([x], "peaks", base=base, name="w", weight=2)
    assert_bits_equal(merged, torch.tensor([2.0, 0.0]))  # the peak, 2, occurs twice
    assert peaks.seen == ["w", "w"]


@pytest.mark.parametrize("memory", ["1MiB", "1GiB"])
@pytest.mark.parametrize("shards", [1, 3])
def test_checkpoints(
    peaks: Peaks, states: list[dict[str, Tensor]], tmp_path: Path, memory: str, shards: int
) -> None:
    base, *models = (
        write_folder(tmp_path / f"m{i}", s, shards=shards) for i, s in enumerate(states)
    )
    config = ties(base, *models, method="peaks")
    manifest = mk.merge_checkpoints(config, tmp_path / "out", memory=memory, progress=False)
    merged = read_folder(tmp_path / "out")
    for key, want in oracle(states[0], states[1:]).items():
        assert_bits_equal(merged[key], want)
    assert len(peaks.seen) == 2 * len(floating(states[0]))
    assert peaks.seen[: len(peaks.seen) // 2] == peaks.seen[len(peaks.seen) // 2 :]
    assert set(peaks.seen) == set(floating(states[0]))
    size = sum(3 * states[0][key].nbytes for key in floating(states[0]))
    buffers = sum(x.nbytes for x in states[0].values() if not x.dtype.is_floating_point)
    assert manifest.bytes_read == 3 * size + buffers


def test_models_that_lack_a_tensor_and_copied_tensors(
    peaks: Peaks, states: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    del states[1]["head.weight"]
    base, *models = (write_folder(tmp_path / f"m{i}", s) for i, s in enumerate(states))
    copied = "embeddings.word.weight"
    rules = [
        {"filter": "head", "action": "present"},
        {"filter": copied, "action": "copy", "from": str(models[0])},
    ]
    config = {**ties(base, *models, method="peaks"), "exceptions": rules}
    mk.merge_checkpoints(config, tmp_path / "out", progress=False)
    assert copied not in peaks.seen
    surveyed = [{k: x for k, x in s.items() if k != copied} for s in states]
    merged = read_folder(tmp_path / "out")
    for key, want in oracle(surveyed[0], surveyed[1:]).items():
        assert_bits_equal(merged[key], want)
    assert_bytes_equal(merged[copied], states[1][copied])


def test_what_goes_wrong_in_a_survey_ends_the_merge(
    peaks: Peaks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_folder(tmp_path / f"m{i}", tensors(i)) for i in range(2)]

    def failing(inputs: Inputs) -> list[tuple[int, Tensor]]:
        if len(peaks.seen) == 3:
            raise RuntimeError("the third tensor")
        return []

    monkeypatch.setattr(peaks, "magnitudes", failing)
    with pytest.raises(RuntimeError, match="the third tensor"):
        mk.merge_checkpoints(ties(*paths, method="peaks"), tmp_path / "out", progress=False)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_budget_holds_in_each_pass(
    peaks: Peaks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors read ahead stay within the memory, and the window is used."""
    n, size = 12, 8 << 20
    blocks = [{f"b{i}": torch.full((size // 4,), j + i + 1.0) for i in range(n)} for j in range(2)]
    paths = [write_folder(tmp_path / f"m{j}", b) for j, b in enumerate(blocks)]
    held = most = 0
    take, give = Window.take, Window.give

    def taking(self: Window, cost: int, sizes: Sequence[int]) -> list[Tensor] | None:
        nonlocal held, most
        taken = take(self, cost, sizes)
        held += cost
        most = max(most, held)
        return taken

    def giving(self: Window, cost: int, buffers: Sequence[Tensor]) -> None:
        nonlocal held
        held -= cost
        give(self, cost, buffers)

    monkeypatch.setattr(Window, "take", taking)
    monkeypatch.setattr(Window, "give", giving)
    config = ties(*paths, method="peaks")
    memory = OVERHEAD + 2 * 3 * size  # two tasks of base, model and result
    mk.merge_checkpoints(config, tmp_path / "out", memory=memory, progress=False)
    assert 3 * size < most <= 2 * 3 * size
    assert not held


def test_method_without_a_survey_gets_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    plain = REGISTRY["linear"]

    def merge(inputs: Inputs, **arguments: Any) -> Tensor:
        seen.append((inputs.survey, inputs.models))
        return plain.merge(inputs, **arguments)

    fields = ("name", "doc", "base", "models", "parameters")
    method = Method(**{f: getattr(plain, f) for f in fields}, merge=merge)
    monkeypatch.setitem(REGISTRY, "linear", method)
    paths = [write_folder(tmp_path / f"m{i}", {"w": torch.ones(2)}) for i in range(2)]
    mk.merge_checkpoints(linear(*paths), tmp_path / "out", progress=False)
    mk.merge_tensors([torch.ones(2)], "linear", weight=1)
    assert seen == [(None, [0, 1]), (None, None)]
    assert math.isfinite(float(read_folder(tmp_path / "out")["w"].sum()))
