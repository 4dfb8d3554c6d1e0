"""regmean of given Gram matrices: its formula, the least squares it solves, what is singular."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern.check import name_of
from mergekern.engine.config import load_config

import cases
from accuracy import assert_bits_equal, assert_within, half_ulp
from refusal import refused

U = 2.0**-53
WEIGHTS = [0.5, 1.25, 2.0, 0.75]


def family(
    n: int, out: int = 11, into: int = 23, dtype: torch.dtype = torch.float32, rows: int = 400
) -> tuple[list[Tensor], list[Tensor]]:
    """n matrices, and second moments of inputs that have a large mean and a few large features."""
    g = torch.Generator().manual_seed(n)
    ws = [torch.randn(out, into, generator=g).to(dtype) for _ in range(n)]
    size = 10.0 ** torch.randint(-2, 3, (into,), generator=g)
    xs = [(torch.randn(rows, into, generator=g) + 0.7).double() * size for _ in range(n)]
    return ws, [x.T @ x / rows for x in xs]


def oracle(
    ws: list[Tensor], gs: list[Tensor], weight: list[float], reduce: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The formula in long double by elimination with pivots, and how far float64 may be off it.

    Sums and solve: in roundings each, of the models' differences to their mean times |G|, through
    the inverse of the sum, whose rows and columns are scaled to a diagonal of 1.
    """
    n, into = len(ws), len(gs[0])
    factor = torch.full((into, into), reduce, dtype=torch.float64).fill_diagonal_(1)
    share = torch.tensor(weight[:n]).double() / sum(weight[:n])
    scaled = [s * g.double() * factor for s, g in zip(share, gs, strict=True)]
    total = np.sum([g.numpy().astype(np.longdouble) for g in scaled], 0)
    wide = [w.double().numpy().astype(np.longdouble) for w in ws]
    center = np.sum([s * w for s, w in zip(share.numpy(), wide)], 0)
    right = np.sum([(w - center) @ g.numpy() for w, g in zip(wide, scaled)], 0)
    value = torch.from_numpy((center + _solve(total, right.T).T).astype(np.float64))
    mean = torch.from_numpy(center.astype(np.float64))
    d = torch.from_numpy(total.astype(np.float64)).diagonal().sqrt()
    inverse = torch.linalg.inv(torch.from_numpy(total.astype(np.float64)) / torch.outer(d, d))
    away = sum(((w.double() - mean).abs() @ g.abs()) / d for w, g in zip(ws, scaled, strict=True))
    bound = 16 * into * U * (away.norm(dim=1, keepdim=True) * inverse.norm() / d)
    return value, bound + 8 * U * (mean.abs() + value.abs())


def _solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.copy(), b.copy()
    for k in range(len(a)):
        p = k + int(np.abs(a[k:, k]).argmax())
        a[[k, p]], b[[k, p]] = a[[p, k]], b[[p, k]]
        for i in range(k + 1, len(a)):
            f = a[i, k] / a[k, k]
            a[i] -= f * a[k]
            b[i] -= f * b[k]
    for k in range(len(a) - 1, -1, -1):
        b[k] = (b[k] - a[k, k + 1 :] @ b[k + 1 :]) / a[k, k]
    return b


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
@pytest.mark.parametrize(("n", "reduce"), [(1, 1.0), (2, 1.0), (4, 0.6), (3, 0.0)])
def test_regmean(n: int, reduce: float, dtype: torch.dtype) -> None:
    ws, gs = family(n, dtype=dtype)
    got = mk.merge_tensors(ws, "regmean", gram=gs, weight=WEIGHTS[:n], reduce=reduce)
    value, bound = oracle(ws, gs, WEIGHTS, reduce)
    assert_within(got, value, bound + half_ulp(value.abs() + bound, dtype))
    assert got.dtype == dtype


def test_it_is_closer_than_an_inverse_in_float32() -> None:
    """As other tools compute it, of the same float32 Gram matrices."""
    ws, gs = family(3)
    gs = [g.float() for g in gs]
    value, _ = oracle(ws, gs, [1.0] * 3)
    inverse = torch.inverse(sum(gs))
    theirs = inverse @ sum(g @ w.T for w, g in zip(ws, gs, strict=True))
    got = mk.merge_tensors(ws, "regmean", gram=gs)
    assert (got - value).norm() <= (theirs.T - value).norm()
    assert_within(got, value, half_ulp(value, torch.float32) * (1 + 2.0**-10))


def test_it_is_the_least_square() -> None:
    """The gradient sum_i w_i (W - W_i) G_i is 0 within what rounding W by U makes of it."""
    ws, gs = family(3, dtype=torch.float64)
    got = mk.merge_tensors(ws, "regmean", gram=gs, weight=WEIGHTS[:3])
    terms = [w * (got - x) @ g for w, x, g in zip(WEIGHTS, ws, gs)]
    size = sum(w * (got.abs() + x.abs()) @ g.abs() for w, x, g in zip(WEIGHTS, ws, gs))
    assert_within(sum(terms), torch.zeros(11, 23).double(), 16 * 23 * U * size)


def test_equal_models_stay_to_the_bit() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        (w, *_), gs = family(3, dtype=dtype)
        assert_bits_equal(mk.merge_tensors([w] * 3, "regmean", gram=gs, weight=WEIGHTS[:3]), w)
        assert_bits_equal(mk.merge_tensors([w], "regmean", gram=gs[:1]), w)


@pytest.mark.parametrize("alike", ["identity", "equal"])
def test_equal_gram_matrices_give_the_mean(alike: str) -> None:
    ws, gs = family(4, dtype=torch.float64)
    gram = torch.eye(23).double() if alike == "identity" else gs[0]
    got = mk.merge_tensors(ws, "regmean", gram=[gram] * 4, weight=WEIGHTS)
    mean = sum(w * x for w, x in zip(WEIGHTS, ws, strict=True)) / sum(WEIGHTS)
    assert_within(got, mean, oracle(ws, [gram] * 4, WEIGHTS)[1])


def test_the_order_of_models_does_not_matter() -> None:
    ws, gs = family(4, dtype=torch.float64)
    got = mk.merge_tensors(ws, "regmean", gram=gs, weight=WEIGHTS)
    turned = mk.merge_tensors(ws[::-1], "regmean", gram=gs[::-1], weight=WEIGHTS[::-1])
    assert_within(turned, got, 2 * oracle(ws, gs, WEIGHTS)[1])


def test_a_model_of_weight_0_counts_nothing() -> None:
    ws, gs = family(3)
    got = mk.merge_tensors(ws, "regmean", gram=gs, weight=[1, 2, 0])
    assert_bits_equal(got, mk.merge_tensors(ws[:2], "regmean", gram=gs[:2], weight=[1, 2]))


# ---- singular --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_singular_gram_matrices(dtype: torch.dtype) -> None:
    """Fewer rows than inputs: what the rows show is fitted, the rest is the mean, and it is said.

    The difference to the mean, times the diagonal d, lies in the rows' space but for what errors
    of the Gram matrices, an eighth of the jitter j, leave of it; and j d is what fitting lacks.
    """
    ws, _ = family(2, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    xs = [torch.linalg.qr(torch.randn(23, 8, generator=g).double())[0].T for _ in range(2)]
    gs = [(x.T @ x).to(dtype) for x in xs]
    least = 23 * {torch.float32: 2.0**-24, torch.float64: U}[dtype]
    with pytest.warns(UserWarning, match="Gram matrix of layer.7 is singular") as told:
        got = mk.merge_tensors(ws, "regmean", gram=gs, name="layer.7")
    how_much = f"expected more than {least:.2g}: {8 * least:.2g} of the diagonal was added"
    assert how_much in str(told[0].message)
    mean, both = (ws[0] + ws[1]) / 2, torch.cat(xs)
    d = (gs[0] + gs[1]).diagonal().double() / 2
    away, zero = got - mean, torch.zeros(()).double()
    unseen = torch.eye(23) - torch.linalg.pinv(both) @ both
    assert_within((away * d @ unseen).norm(), zero, (away * d).norm() / 8)
    gradient = sum((got - w) @ x.T @ x for w, x in zip(ws, xs, strict=True)) / 2
    assert_within(gradient.norm(), zero, 9 * least * ((away * d).norm() + (ws[0] - ws[1]).norm()))


def test_inputs_that_are_always_0_keep_the_mean_without_a_word() -> None:
    """As of rectified features that never fire."""
    ws, gs = family(3)
    for g in gs:
        g[5] = g[:, 5] = 0
    got = mk.merge_tensors(ws, "regmean", gram=gs)
    mean = (ws[0].double() + ws[1] + ws[2]) / 3
    assert_within(got[:, 5], mean[:, 5], half_ulp(mean[:, 5], torch.float32) * (1 + 2.0**-20))
    nothing = [torch.zeros(23, 23)] * 3
    got = mk.merge_tensors(ws, "regmean", gram=nothing)
    assert_within(got, mean, half_ulp(mean, torch.float32) * (1 + 2.0**-20))


def test_reduced_gram_matrices_are_not_singular() -> None:
    ws, _ = family(2)
    x = torch.randn(3, 23, generator=torch.Generator().manual_seed(0)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = mk.merge_tensors(ws, "regmean", gram=[x.T @ x, 2 * x.T @ x], reduce=0.9)
    assert got.isfinite().all()


# ---- whole models ----------------------------------------------------------------------------


def test_state_dicts() -> None:
    """Matrices by their Gram matrices, or the mean where None says so; the rest is averaged."""
    ws, gs = family(2)
    es = [torch.randn(9, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    models = [
        {"fc.weight": w, "embed": e, "fc.bias": w[:, 0], "conv": w[:8].reshape(2, 4, -1), "n": k}
        for w, e, k in zip(ws, es, [torch.tensor(3)] * 2, strict=True)
    ]
    grams = [{"fc.weight": g, "embed": None} for g in gs]
    given = {"weight": [1, 3]}
    got = mk.merge_state_dicts(models, "regmean", gram=grams, **given)
    assert_bits_equal(got["fc.weight"], mk.merge_tensors(ws, "regmean", gram=gs, **given))
    for key in ("embed", "fc.bias", "conv"):
        expected = mk.merge_tensors([m[key] for m in models], "linear", **given)
        assert_bits_equal(got[key], expected)
    assert_bits_equal(got["n"], torch.tensor(3))
    assert list(got) == list(models[0])


def test_no_matrix_is_passed_over_in_silence() -> None:
    ws, gs = family(2)
    models = [{"w": w, "b": w[:, 0]} for w in ws]

    def merge(*grams: object) -> None:
        mk.merge_state_dicts(models, "regmean", gram=list(grams))

    for given in ([{}, {}], [{"w": gs[0]}, {}], [{"w": gs[0]}, {"w": None}]):
        with refused("merge_state_dicts", "w: missing from gram[", sentence=False):
            merge(*given)
    with refused("merge_state_dicts", "q: missing from state_dicts", sentence=False):
        merge(*({"w": g, "q": g} for g in gs))
    with refused("merge_state_dicts", "b: missing from state_dicts", sentence=False):
        merge(*({"w": g, "b": g} for g in gs))
    with refused("regmean", "gram of b is no tensor", "None"):
        merge(*({"w": g, "b": None} for g in gs))
    with refused("regmean", "gram does not fit", "1 values", "2 state dicts"):
        merge({"w": gs[0]})
    with refused("regmean", "gram does not fit", "NoneType"):
        mk.merge_state_dicts(models, "regmean")
    with refused("merge_state_dicts", "w: shape differs", sentence=False):
        merge(*({"w": g[:5, :5]} for g in gs))
    with refused("regmean", "w has too few Gram matrices", "0 of 2", "None for each"):
        mk.merge_tensors(ws, "regmean", name="w")
    with refused("regmean", "too few Gram matrices", "1 of 2"):
        mk.merge_tensors(ws, "regmean", gram=[gs[0], None])
    with refused("regmean", "which is no matrix", "[11]"):
        mk.merge_tensors([w[:, 0] for w in ws], "regmean", gram=gs)


@pytest.mark.parametrize("shape", [(7,), (), (3, 4, 2, 2), (0, 5), (5, 0)])
def test_what_is_no_matrix_is_averaged(shape: tuple[int, ...]) -> None:
    xs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    gram = [torch.zeros(shape[1], shape[1])] * 3 if len(shape) == 2 else None
    got = mk.merge_tensors(xs, "regmean", gram=gram, weight=WEIGHTS[:3])
    assert_bits_equal(got, mk.merge_tensors(xs, "linear", weight=WEIGHTS[:3]))


def test_what_is_no_number_stays_in_its_row() -> None:
    ws, gs = family(2)
    ws[1][3, 4] = math.nan
    got = mk.merge_tensors(ws, "regmean", gram=gs)
    assert got[3].isnan().all()
    assert got[[0, 1, 2, 4]].isfinite().all()


def test_refusals() -> None:
    ws, gs = family(2)
    for bad, words in (
        (gs[1][:7, :7], ("gram[1] of w does not fit", "[7, 7]", "[23, 23]")),
        (gs[1].bfloat16(), ("gram[1] of w is too coarse", "bfloat16")),
        (torch.full((23, 23), math.nan), ("gram[1] of w[0, 0] is not finite",)),
        (gs[1].triu(), ("gram[1] of w is not symmetric", "x^T x / n")),
        (-2 * gs[0], ("of w are not positive semidefinite", "second moments")),
    ):
        with refused("regmean", *words):
            mk.merge_tensors(ws, "regmean", gram=[gs[0], bad], name="w")
    with refused("regmean", "weights cannot be normalized"):
        mk.merge_tensors(ws, "regmean", gram=gs, weight=0)
    for given in ({"weight": -1}, {"reduce": 1.5}, {"reduce": -0.1}):
        with refused("regmean", "is out of range"):
            mk.merge_tensors(ws, "regmean", gram=gs, **given)
    with pytest.raises(mk.BackendError, match="regmean"):
        mk.merge_tensors(ws, "regmean", gram=gs, backend="cpu")
    text = {"merge_method": "regmean", "models": [{"model": "a"}, {"model": "b"}]}
    with pytest.raises(mk.ConfigError, match=r"regmean needs a tensor per model \(gram\)"):
        load_config(text)
