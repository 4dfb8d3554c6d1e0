"""Covariance: saved states, what is refused, who serves, and ZipIt as its peer."""

from __future__ import annotations

import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekern as mk

import zipit
from accuracy import assert_bits_equal, assert_within
from moments import FEW, assert_same, pair, rows, snapshot
from refusal import refused

OP = "covariance"
pytestmark = FEW


# ---- saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim_y", [None, 4])
def test_state(dim_y: int | None, backend: str, device: str, tmp_path: Path) -> None:
    x, y = (v.to(device) for v in pair(700, 5, 4))
    batch = (x, y) if dim_y else (x,)
    whole, half = (mk.Covariance(5, dim_y, device=device, backend=backend) for _ in range(2))
    whole.update(*batch)
    half.update(*batch)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    other = mk.Covariance(5, dim_y, device=device, backend=backend)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_same(other.state_dict(), half.state_dict())
    for moments in (whole, other):
        moments.update(*batch)
    assert_same(other.state_dict(), whole.state_dict())
    assert_bits_equal(other.correlation(), whole.correlation())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": torch.tensor(-1)}, "count is negative; got -1; expected 0 or more"),
        ({"count": torch.tensor(1.0)}, "count does not fit"),
        ({"mean_x": torch.zeros(4, dtype=torch.float64)}, "mean_x does not fit"),
        ({"products": torch.zeros(3, 3)}, "products does not fit"),
        ({"more": torch.zeros(1)}, "state has other names"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit(change: dict[str, Tensor], words: str) -> None:
    moments = mk.Covariance(3)
    moments.update(rows(5, 3))
    before = snapshot(moments)
    with refused(OP, words):
        moments.load_state_dict({**before, **change})
    assert_same(snapshot(moments), before)


# ---- the door ----------------------------------------------------------------------------------


def test_fewer_rows_than_features_warn_once(backend: str, device: str) -> None:
    moments = mk.Covariance(3, device=device, backend=backend)
    moments.update(rows(2, 3).to(device))
    with pytest.warns(UserWarning, match=r"covariance: fewer rows .*; got 2; expected 3 or more"):
        moments.correlation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moments.covariance()
        moments.update(rows(2, 3).to(device))
        moments.correlation()


X, Y = torch.zeros(4, 3), torch.zeros(4, 2)
REFUSALS: dict[str, tuple[Any, str]] = {
    "no rows": (lambda: mk.covariance(X[:0]), "there are no rows; got 0; expected at least one"),
    "no mean": (lambda: mk.Covariance(3).mean, "there are no rows"),
    "no variance": (lambda: mk.Covariance(3, 2).variance_y, "there are no rows"),
    "vector": (lambda: mk.covariance(X[0]), "x has no rows; got (3,); expected [..., features]"),
    "no features": (lambda: mk.covariance(X[:, :0]), "x has no features"),
    "integers": (lambda: mk.covariance(X.int()), "int32"),
    "list": (lambda: mk.covariance([X]), "x is no tensor; got list"),
    "empty list": (lambda: mk.Covariance(3).update([]), "x is an empty list; got 0; expected one"),
    "no tensor in a list": (
        lambda: mk.Covariance(3, 3).update(X, [X, 1]),
        "y[1] is no tensor; got int",
    ),
    "features of a list": (
        lambda: mk.Covariance(3).update([X, Y]),
        "x has another number of features; got 5; expected 3",
    ),
    "rows of a list": (
        lambda: mk.Covariance(5).update([X, Y[1:]]),
        "x differs from x in rows; got 3; expected 4",
    ),
    "dtypes of a list": (
        lambda: mk.Covariance(5).update([X, Y.half()]),
        "x differs from x in dtype; got float16; expected float32",
    ),
    "meta": (lambda: mk.covariance(X.to("meta")), "meta"),
    "dim": (lambda: mk.Covariance(0), "dim_x is no number of features; got 0; expected 1 or more"),
    "dim type": (lambda: mk.Covariance(3, 2.0), "dim_y is no number of features; got 2.0"),
    "nan": (lambda: mk.covariance(X, nan="drop"), "nan is unknown; got 'drop'"),
    "y missing": (lambda: mk.Covariance(3, 2).update(X), "y does not fit dim_y; got no y"),
    "y not asked for": (lambda: mk.Covariance(3).update(X, Y), "y does not fit dim_y; got y"),
    "features": (
        lambda: mk.Covariance(4).update(X),
        "x has another number of features; got 3; expected 4",
    ),
    "features of y": (lambda: mk.Covariance(3, 3).update(X, Y), "y has another number of features"),
    "rows": (lambda: mk.covariance(X, Y[1:]), "y differs from x in rows; got 3; expected 4"),
    "dtypes": (lambda: mk.covariance(X, Y.half()), "y differs from x in dtype; got float16"),
    "mask dtype": (lambda: mk.covariance(X, mask=torch.ones(4)), "mask is not bool; got float32"),
    "mask size": (
        lambda: mk.covariance(X, mask=torch.ones(3, dtype=torch.bool)),
        "mask does not fit the rows; got (3,); expected (4,)",
    ),
    "mask shape": (
        lambda: mk.covariance(X.view(2, 2, 3), mask=torch.ones(1, 4, dtype=torch.bool)),
        "mask does not fit the rows; got (1, 4); expected (2, 2) or (4,)",
    ),
    "mask of none": (
        lambda: mk.covariance(X, mask=torch.zeros(4, dtype=torch.bool)),
        "there are no rows",
    ),
    "eps": (lambda: mk.correlation(X, eps=-1.0), "eps is negative; got -1.0; expected 0 or more"),
    "eps type": (lambda: mk.correlation(X, eps="x"), "eps is no number"),
    "other": (lambda: mk.Covariance(3).merge(X), "other is none; got Tensor"),
    "other's sizes": (
        lambda: mk.Covariance(3).merge(mk.Covariance(3, 3)),
        "other differs in sizes; got [3, 3]; expected [3]",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    call, words = REFUSALS[what]
    with refused(OP, words):
        call()


def test_a_backend_that_cannot_serve_is_refused_at_once() -> None:
    with refused(OP, "no such backend", error=mk.BackendError, sentence=False):
        mk.Covariance(3, backend="abacus")


@pytest.mark.parametrize("kernel", ["column_means", "center", "pack", "add_products"])
def test_the_kernel_is_the_compiled_one(
    kernel: str, cpu_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("this kernel was called")

    monkeypatch.setattr(cpu_backend._cpu, kernel, broken)
    with pytest.raises(RuntimeError, match="this kernel was called"):
        mk.covariance(X, backend="cpu")


# ---- ZipIt -------------------------------------------------------------------------------------


def host_bound(features: Tensor, n: int) -> Tensor:
    """Of E[xy] - E[x] E[y] in float32: n products and sums, and a few steps after."""
    largest = features.abs().amax(1).double()
    return (2 * n + 16) * 2.0**-24 * torch.outer(largest, largest)


@zipit.needed
def test_the_original_of_zipit(monkeypatch: pytest.MonkeyPatch) -> None:
    """CovarianceMetric and compute_correlation, on batches with NaN, over all models' features."""
    monkeypatch.syspath_prepend(zipit.checkout())
    host = importlib.import_module("metric_calculators")
    metric, moments = host.CovarianceMetric(), mk.Covariance(40, nan="zero")
    batches = [[rows(320, 20, seed=2 * i + model).T for model in (0, 1)] for i in range(4)]
    for batch in batches:
        batch[0][3, 5], batch[1][7, 9] = math.nan, math.inf
        batch[0][11] = 0.5
        metric.update(10, *batch)
        moments.update(torch.cat(batch).T)
    expected = metric.finalize(40)
    features = torch.cat([torch.cat(b) for b in batches], 1).nan_to_num(0.0, 0.0, 0.0)
    limit = host_bound(features, features.shape[1])
    assert_within(moments.covariance(), expected.double(), limit)
    varying = torch.arange(40) != 11
    got = moments.correlation(eps=1e-7)[varying][:, varying]
    correlation = host.compute_correlation(expected)[varying][:, varying].double()
    variance = moments.variance_x[varying]
    relative = (limit[varying][:, varying] / torch.outer(variance.sqrt(), variance.sqrt())).max()
    assert_within(got, correlation, 2.1 * relative)
