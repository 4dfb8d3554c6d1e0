"""Statistics of several processes: those of all their batches, the same bits in each of them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mergekern.align.statistics.collect import collect_statistics
from mergekern.align.statistics.statistics import Statistics
from mergekern.align.zip_models import zip_models
from mergekern.errors import ArgumentError

from accuracy import assert_within
from align.nets import Convs, Mlp
from align.test_statistics import LAYERS, SPACES, call_of, check_covariance, inputs, rows
from align.test_statistics import trained as models_of
from engine.jobs import started
from refusal import refused

RANKS = 4
# Which of the three batches a rank brings: the last rank has none, or the first has none.
SPLITS = {"last": lambda b, rank: b[rank::RANKS], "first": lambda b, rank: b[rank - 1 : rank]}


def some(kind: type[nn.Module], split: str, rank: int) -> list[Any]:
    return SPLITS[split](inputs(kind), rank)


# ---- what each rank does -----------------------------------------------------------------------


def collect(folder: Path) -> int:
    """All cases in one start of the processes; a result or a refusal of each goes to a file."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, pair = dist.group.WORLD, dist.new_group([1, 3])

    def case(label: str, kind: type[nn.Module], models: list[nn.Module], batches: Any, **more: Any):
        try:
            found = collect_statistics(models, batches, SPACES[kind](), **more)
            found.save(folder / f"{label}.{rank}")
        except ArgumentError as error:
            (folder / f"{label}.{rank}").write_text(str(error))

    for split in SPLITS:
        batches = some(Convs, split, rank)
        case(split, Convs, models_of(Convs, 3), batches, group=world, within=split == "last")
    case("passes", Mlp, models_of(Mlp), some(Mlp, "last", rank), group=world, memory=8 * 16**2)
    if rank in (1, 3):
        case("pair", Mlp, models_of(Mlp), some(Mlp, "first", rank), group=pair)
    case("none", Mlp, models_of(Mlp), [], group=world)
    bad = [x * float("nan") for x in some(Mlp, "last", rank)] if rank == 1 else inputs(Mlp)
    case("nan", Mlp, models_of(Mlp), bad, group=world)
    case("others", Mlp, models_of(Mlp, 2 + (rank == 2))[-2:], inputs(Mlp), group=world)
    case("options", Mlp, models_of(Mlp), inputs(Mlp), group=world, within=rank != 3)
    dist.destroy_process_group()
    return 0


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    with started(RANKS, partial(collect, folder), folder / "logs") as job:
        for ended in job.wait():
            assert ended.code == 0, ended.err
    return folder


def same_of_all(folder: Path, label: str, ranks: tuple[int, ...] = (0, 1, 2, 3)) -> Path:
    """The file of one rank, when all have written the same bytes."""
    each = {(folder / f"{label}.{rank}").read_bytes() for rank in ranks}
    assert len(each) == 1
    return folder / f"{label}.{ranks[0]}"


def check_statistics(stats: Statistics, kind: type[nn.Module], count: int, x: Tensor) -> None:
    """Against plain torch on all rows at once, within the bound of `covariance`."""
    models = models_of(kind, count)
    for name, seen in rows(models, x).items():
        size = stats.spaces[name].size
        assert stats.count(name) == len(seen)
        sides = (seen, seen) if stats.within else (seen[:, :size], seen[:, size:])
        check_covariance(stats.covariances[name].covariance(), *sides)


# ---- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_moments_are_of_the_rows_of_all(done: Path, split: str) -> None:
    stats = Statistics.load(same_of_all(done, split), SPACES[Convs](), models_of(Convs, 3))
    check_statistics(stats, Convs, 3, torch.cat(inputs(Convs)))


def test_outputs_are_of_the_rows_of_all(done: Path) -> None:
    stats = Statistics.load(same_of_all(done, "passes"), SPACES[Mlp]())
    for layer, moments in zip(LAYERS[Mlp], stats.outputs.values(), strict=True):
        for model, found in zip(models_of(Mlp, 2), moments, strict=True):
            y = call_of(model, layer, inputs(Mlp))[1].double()
            n, largest, spread = len(y), y.abs().amax(0), y.var(0, correction=0)
            assert found.rows == n
            assert_within(found.mean, y.mean(0), (2 * n + 4) * 2.0**-53 * largest)
            bound = 264 * 2**-24 * spread + (2 * n + 128) * 2**-53 * largest**2
            assert_within(found.variance, spread, bound)


def test_several_passes_give_the_same_bytes(done: Path) -> None:
    path = same_of_all(done, "passes")
    check_statistics(Statistics.load(path, SPACES[Mlp]()), Mlp, 2, torch.cat(inputs(Mlp)))


def test_a_group_is_not_the_whole_world(done: Path) -> None:
    """Ranks 1 and 3 by themselves: the first and the last batch."""
    stats = Statistics.load(same_of_all(done, "pair", (1, 3)), SPACES[Mlp]())
    check_statistics(stats, Mlp, 2, torch.cat(inputs(Mlp)[::2]))


# ---- refusals ----------------------------------------------------------------------------------


def refusals(folder: Path, label: str) -> list[str]:
    return [(folder / f"{label}.{rank}").read_text() for rank in range(RANKS)]


def test_no_batches_anywhere_are_refused_by_all(done: Path) -> None:
    assert len(set(refusals(done, "none"))) == 1
    assert "there are no batches; got none; expected" in refusals(done, "none")[0]


def test_what_goes_wrong_in_one_ends_all(done: Path) -> None:
    texts = refusals(done, "nan")
    assert "models[0] has NaN or infinite activations" in texts[1]
    for rank in (0, 2, 3):
        assert texts[rank].startswith("collect_statistics: rank 1 has failed; got ")
        assert "NaN" in texts[rank]


def test_other_models_or_options_are_refused_by_all(done: Path) -> None:
    for text in refusals(done, "others"):
        assert text.startswith("collect_statistics: rank 2 was given other models than rank 0; got")
    for text in refusals(done, "options"):
        assert text.startswith("collect_statistics: rank 3 was given other options than rank 0")


def test_zip_models_takes_no_group() -> None:
    with refused("zip_models", "parameter is unknown", "group"):
        zip_models(models_of(Mlp), inputs(Mlp), group=None, spaces=SPACES[Mlp]())
