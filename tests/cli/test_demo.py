"""mergekern demo: the rows mean what the table says, and nothing global is left changed."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from mergekern import zip_models
from mergekern.cli import demo_encoders as demo
from mergekern.errors import ArgumentError

from accuracy import assert_bytes_equal, assert_within

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

EPOCHS = 8


@pytest.fixture(scope="module")
def printed() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def rows(printed: io.StringIO) -> dict[str, demo.Row]:
    console = Console(file=printed, width=100)
    return {row.name: row for row in demo.run(seed=0, epochs=EPOCHS, console=console)}


def test_rows_and_names(rows: dict[str, demo.Row]) -> None:
    merged = ["average", "permute", "zip", "partial zip"]
    assert list(rows) == ["model A", "model B", *merged, "ensemble"]
    for row in rows.values():
        assert all(0 <= share <= 1 for share in (row.joint, row.task_a, row.task_b))
        assert row.seconds > 0


def test_expert_knows_only_its_own_task(rows: dict[str, demo.Row]) -> None:
    a, b = rows["model A"], rows["model B"]
    assert min(a.task_a, b.task_b) > 0.9
    # Chance is 0.2 in the mean, but an unseen digit tends to fall whole into one class: 32 models
    # (16 seeds and lengths) measured 0.06 to 0.37.
    assert max(a.task_b, b.task_a) < 0.45
    # A joint answer is right on the known half at most, but for a few lucky unseen images.
    assert 0.4 < a.joint < 0.6
    assert 0.4 < b.joint < 0.6


def test_ensemble_knows_both(rows: dict[str, demo.Row]) -> None:
    a, b, ensemble = rows["model A"], rows["model B"], rows["ensemble"]
    assert ensemble.joint > max(a.joint, b.joint) + 0.1
    assert (ensemble.task_a, ensemble.task_b) == (a.task_a, b.task_b)


def test_average_is_below_ensemble(rows: dict[str, demo.Row]) -> None:
    assert rows["average"].joint < rows["ensemble"].joint - 0.1


def test_what_is_aligned_is_above_average(rows: dict[str, demo.Row]) -> None:
    average = rows["average"].joint
    assert min(rows[name].joint for name in ("permute", "zip")) > average
    assert rows["partial zip"].joint > max(average, rows["model A"].joint, rows["model B"].joint)


def test_prints_every_row_in_percent(rows: dict[str, demo.Row], printed: io.StringIO) -> None:
    text = printed.getvalue()
    for row in rows.values():
        line = next(line for line in text.splitlines() if f"│ {row.name} " in line)
        assert f"{100 * row.joint:.1f}" in line
        assert demo.TIMED.get(row.name, "merging") in line
    assert "not aligned" in text
    assert "joint column" in text


def test_same_seed_same_rows_other_seed_other_rows() -> None:
    first, again, other = (demo.run(seed=s, epochs=1) for s in (3, 3, 4))
    assert [row[:4] for row in first] == [row[:4] for row in again]
    assert [row[:4] for row in first] != [row[:4] for row in other]


def test_global_state_is_untouched() -> None:
    before = torch.get_rng_state(), torch.get_num_threads(), np.random.get_state()  # noqa: NPY002
    torch.set_num_threads(demo.THREADS + 1)  # so that a run that does not restore shows
    try:
        demo.run(seed=0, epochs=1)
        assert torch.get_num_threads() == demo.THREADS + 1
    finally:
        torch.set_num_threads(before[1])
    assert torch.equal(before[0], torch.get_rng_state())
    after = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(before[2][1], after[1])
    assert before[2][2:] == after[2:]


def test_experts_start_from_different_weights() -> None:
    data, codes = demo.load_data(0), demo.class_codes(0)
    (_, a, _), (_, b, _) = demo.experts(data, codes, seed=0, epochs=1)
    # Also what lets a merge copy the counter instead of refusing it.
    assert a.features[1].num_batches_tracked == b.features[1].num_batches_tracked == demo.STEPS
    heads = torch.stack([a.head.weight.flatten(), b.head.weight.flatten()])
    assert abs(torch.corrcoef(heads)[0, 1].item()) < 0.2


def test_split_holds_every_image_and_all_digits_in_both_parts() -> None:
    data = demo.load_data(0)
    assert len(data.train_images) + len(data.test_images) == 1797
    assert data.train_images.shape[1:] == (1, 8, 8)
    assert data.train_images.min() == 0
    assert data.train_images.max() == 1
    for labels in (data.train_labels, data.test_labels):
        assert labels.unique().tolist() == list(range(10))
    for task in (data.train_labels < 5, data.train_labels >= 5):
        assert int(task.sum()) >= demo.STEPS * demo.BATCH


def test_accuracies_by_hand() -> None:
    labels = torch.tensor([0, 4, 5, 9])
    scores = torch.zeros(4, 10)
    scores[0, 0] = 1.0  # right everywhere
    scores[1, 4], scores[1, 7] = 1.0, 2.0  # right in task A, wrong jointly
    scores[2, 6] = 1.0  # wrong everywhere
    scores[3, 9] = 1.0
    assert demo.accuracies(scores, labels) == (0.5, 1.0, 0.5)


def test_each_head_of_a_partial_zip_has_its_own_codes() -> None:
    with torch.random.fork_rng(devices=[]):
        models = [demo.Encoder(width=4).eval() for _ in range(2)]
    data, codes = demo.load_data(0), demo.class_codes(0)
    images = data.train_images[:100]
    partial = zip_models(models, [images], method="identity", until=demo.UNTIL, repair="none")
    found = demo.cosines(partial, images, codes)
    with torch.no_grad():
        a, b = partial(images)
    assert_bytes_equal(found, torch.cat([a @ codes[:5].T, b @ codes[5:].T], 1))
    assert list(partial.heads[0].state_dict()) == ["head.weight", "head.bias"]


def test_the_average_is_repaired() -> None:
    with torch.random.fork_rng(devices=[]):
        model = demo.Encoder(width=32).eval()
    images = demo.load_data(0).train_images[:100]
    norm = demo.average([model, model], images).features[1]
    with torch.no_grad():
        x = model.features[0](images).double()
    largest, rounding = x.abs().amax(), 6400 * torch.finfo(torch.float32).eps  # sums of 6400
    assert_within(norm.running_mean, x.mean((0, 2, 3)), rounding * largest)
    assert_within(norm.running_var, x.var((0, 2, 3)), rounding * largest**2)


def test_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sklearn", "sklearn.datasets", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ArgumentError) as caught:
        demo.run(epochs=1)
    assert str(caught.value) == "demo: scikit-learn is not installed; pip install 'mergekern[demo]'"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"seed": -1}, "demo: seed is out of range; got -1; expected 0 to 2**32 - 1"),
        ({"epochs": 0}, "demo: epochs is too small; got 0; expected at least 1"),
    ],
)
def test_refuses_what_it_cannot_run(wrong: dict[str, int], text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        demo.run(**wrong)
    assert str(caught.value) == text
