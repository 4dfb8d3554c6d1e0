"""study_adapters against dense matrices in float64 and scipy's principal angles, and its report."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import scipy.linalg
import torch
from torch import Tensor

import mergekern as mk
from mergekern.adapters.adapter import Adapter, Factors
from mergekern.adapters.picture import check_report, write_report
from mergekern.adapters.study import study_adapters

from accuracy import assert_within
from adapters.random_adapters import SHAPES, adapter, dense, factors
from drawn import check_texts
from refusal import refused

OP = "study_adapters"
EPS = torch.finfo(torch.float64).eps


def rounding(f: Factors) -> float:
    """Of float64, of a product of these factors: what QR and SVD leave of it, a few times over."""
    return 64 * EPS * f.scale * float(f.a.double().norm() * f.b.double().norm())


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def assert_close(got: float, expected: float, bound: float) -> None:
    assert_within(number(got), number(expected), number(bound))


@pytest.mark.parametrize("ranks", [(4, 4), (1, 7, 3), (60, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_dense_matrices(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also where a rank is larger than a side of the weight."""
    adapters = [adapter(i, r, 0.5 + i, dtype) for i, r in enumerate(ranks)]
    found = study_adapters(adapters)
    for name, (out, shape) in SHAPES.items():
        module = found.modules[name]
        assert module.size == (out, math.prod(shape))
        assert module.kept is None
        matrices = [dense(a.modules[name]) for a in adapters]
        errors = []
        for a, matrix, got in zip(adapters, matrices, module.spectra, strict=True):
            f = a.modules[name]
            exact = torch.linalg.svdvals(matrix)[: min(f.rank, *module.size)]
            assert got is not None
            assert_within(number(got), exact, number(rounding(f)).expand(len(exact)))
            errors.append(rounding(f) / float(exact[-1]))  # of the spaces, as Wedin bounds it
        for i, x in enumerate(matrices):
            for j, y in enumerate(matrices):
                bound = 4 * (errors[i] + errors[j])
                for pair, alignment in ((x, y), module.columns), ((x.T, y.T), module.rows):
                    spaces = (scipy.linalg.orth(matrix.numpy()) for matrix in pair)
                    angles = torch.from_numpy(scipy.linalg.subspace_angles(*spaces))
                    exact = angles.cos().square().mean()
                    assert_within(alignment[i, j], exact, number(bound))


@pytest.mark.parametrize("method", ["cat", "svd", "knots_ties", "core_ta"])
def test_what_a_merge_kept(method: str) -> None:
    adapters = [adapter(i, 2 + i, 1.0 + i, torch.float64) for i in range(3)]
    merged = mk.merge_adapters(adapters, method, rank=5)
    found = study_adapters(adapters, merged)
    for name in SHAPES:
        whole = sum((dense(a.modules[name]) for a in adapters), number(0.0))
        kept = float(dense(merged.modules[name]).norm() / whole.norm())
        bound = sum(rounding(a.modules[name]) for a in adapters) / float(whole.norm())
        assert_close(found.modules[name].kept or 0.0, kept, 4 * bound)
        assert found.modules[name].lost == merged.lost[name]


def test_spaces_that_are_known() -> None:
    """Equal, contained, orthogonal, at 60 degrees."""
    e = torch.eye(6)
    half = torch.stack([0.5 * e[0] + math.sqrt(0.75) * e[3]])
    spaces = [e[:2], e[:3], e[4:5], half]
    g = torch.Generator().manual_seed(0)
    ones = [Adapter({"fc": Factors(torch.randn(len(s), 9, generator=g), s.T)}) for s in spaces]
    columns = study_adapters(ones).modules["fc"].columns
    expected = [[1, 1, 0, 0.25], [1, 1, 0, 0.25], [0, 0, 1, 0], [0.25, 0.25, 0, 1]]
    # sqrt(3/4) is off by 2^-25 in float32, which moves a squared cosine by no more than twice that.
    assert_within(columns, torch.tensor(expected).double(), number(2.0**-24))


def test_a_scale_is_no_direction() -> None:
    one = adapter(0)
    other = Adapter({name: Factors(f.a, f.b, -4.0, f.shape) for name, f in one.modules.items()})
    for name, module in study_adapters([one, other]).modules.items():
        first, second = (number(s) for s in module.spectra)
        error = 4 * rounding(one.modules[name])
        assert_within(second, 4 * first, number(error))
        assert_within(module.columns, torch.ones(2, 2).double(), number(error / float(first[-1])))


def test_by_chance() -> None:
    """Spaces drawn at random have the alignment that `chance` says, on average."""
    g = torch.Generator().manual_seed(0)
    shapes = {f"m{i}": (50, 40, 5) for i in range(200)}
    adapters = [
        Adapter(
            {
                name: Factors(torch.randn(r, w, generator=g), torch.randn(h, r, generator=g))
                for name, (h, w, r) in shapes.items()
            }
        )
        for _ in range(2)
    ]
    found = study_adapters(adapters)
    assert found.chance(0) == 5 / 50
    assert found.chance(1) == 5 / 40
    # The standard error of 200 means of a Beta variable's like is below 0.003 at these sizes.
    assert_close(float(found.columns()[0, 1]), 5 / 50, 0.012)
    assert_close(float(found.rows()[0, 1]), 5 / 40, 0.012)


def test_modules_that_are_missing_zero_or_cancel() -> None:
    one, other = adapter(0, dtype=torch.float64), adapter(1, dtype=torch.float64)
    del one.modules["stem"]
    f = other.modules["blocks.0.q"]
    other.modules["blocks.0.q"] = Factors(f.a, 0 * f.b, 1.0, f.shape)
    f = one.modules["blocks.0.fc"]
    other.modules["blocks.0.fc"] = Factors(3 * f.a, f.b / -3, 1.0, f.shape)
    found = study_adapters([one, other], one)
    stem, q, fc = (found.modules[name] for name in ("stem", "blocks.0.q", "blocks.0.fc"))
    assert stem.spectra[0] is None
    assert stem.kept is None
    assert stem.columns.isnan().tolist() == [[True, True], [True, False]]
    assert q.spectra[1] == []
    assert q.rows.isnan().tolist() == [[False, True], [True, True]]
    assert_close(q.kept or 0.0, 1.0, 1e-12)
    assert math.isnan(fc.kept or 0.0)
    assert found.columns().isnan().sum() == 0
    text = json.dumps(found.plain(), allow_nan=False)
    assert json.loads(text)["modules"]["stem"]["columns"][0] == [None, None]


def test_modules_come_by_depth() -> None:
    f = factors(4, (3,), 2, 0)
    names = ["layers.2.q", "layers.10.q", "layers.10.a", "head"]
    found = study_adapters([Adapter(dict.fromkeys(names, f))])
    assert [*found.modules] == ["head", "layers.2.q", "layers.10.a", "layers.10.q"]


def test_no_matrix_of_a_weights_size() -> None:
    """It would have 320 GB."""
    adapters = [Adapter({"fc": factors(200_000, (200_000,), 2, seed)}) for seed in range(2)]
    merged = mk.merge_adapters(adapters, "cat")
    assert_close(study_adapters(adapters, merged).modules["fc"].kept or 0.0, 1.0, 1e-6)


def test_refusals() -> None:
    with refused(OP, "there are no task vectors"):
        study_adapters([])
    with refused(OP, "stem differs in shape"):
        study_adapters([adapter(0), Adapter({"stem": factors(9, (4,), 2, 0)})])
    with refused(OP, "merged has other modules; got fc"):
        study_adapters([adapter(0)], Adapter({"fc": factors(9, (4,), 2, 0)}))
    bad = adapter(1)
    bad.modules["stem"].b[2, 3] = math.inf
    with refused(OP, "stem of adapter 1[2, 3] is not finite; got inf"):
        study_adapters([adapter(0), bad])


# ---- the report ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "layers"), [(1, 1), (3, 60), (13, 1)])
def test_the_report(n: int, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts lie apart, whatever the number of adapters and modules; numbers are the study's."""
    pytest.importorskip("matplotlib", reason="matplotlib: not installed")
    check_texts(monkeypatch)
    adapters = [
        Adapter(
            {
                f"encoder.layers.{i}.attention.{k}_projection": factors(12, (9,), 3, 99 * j + i)
                for i in range(layers)
                for k in "qv"
            }
        )
        for j in range(n)
    ]
    study = study_adapters(adapters, mk.merge_adapters(adapters, "svd", rank=2))
    names = [rf"/a/rather/long/path/of/an/adapter/$\frac${i}" for i in range(n)]
    write_report(study, tmp_path / "new", names=names, title=names[0])
    numbers = json.loads((tmp_path / "new" / "report.json").read_text())
    assert numbers == {"title": names[0], "adapters": names, **study.plain()}


def test_a_report_of_nothing_to_show(tmp_path: Path) -> None:
    """Zero task vectors, no module in common; the same bytes twice."""
    pytest.importorskip("matplotlib", reason="matplotlib: not installed")
    f = factors(4, (3,), 2, 0)
    zero = Factors(f.a, 0 * f.b, 1.0, f.shape)
    adapters = [Adapter({"a": zero}), Adapter({"b": zero})]
    for folder in ("one", "two"):
        write_report(study_adapters(adapters), tmp_path / folder, names="01", title="")
    one, two = ((tmp_path / folder / "report.png").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_where_no_report_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("")
    with refused("report", "report.json exists"):
        check_report(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused("report", "matplotlib is not installed"):
        check_report(tmp_path / "other")
