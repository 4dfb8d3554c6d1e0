"""zip_match: the labels of the formula and of ZipIt's code, on every backend."""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import mergekern as mk
from mergekern import reference
from mergekern.check import accumulator, name_of

import cases
import zipit
from accuracy import assert_bits_equal
from refusal import refused

OP = "zip_match"

# ---- the formula ---------------------------------------------------------------------------------


def formula(
    x: Tensor, sizes: list[int], width: int, alpha: float, budgets: list[int], host: str | None
) -> list[int]:
    """Slots that stay where they are, pairs in dictionaries, forbidden pairs in a set."""
    acc = np.float64 if x.dtype == torch.float64 else np.float32
    n, models, a = len(x), range(len(sizes)), acc(alpha)
    model = [m for m in models for _ in range(sizes[m])]
    value = {(i, j): acc(x[i, j].item()) for i, j in itertools.permutations(range(n), 2)}
    kin = [(i, j) for i, j in value if model[i] == model[j]]
    forbidden = {(i, j) for i, j in kin if budgets[model[i]] == 0}
    left, budget, group, relaxed, lost = list(range(n)), list(budgets), {}, False, set()
    while len(left) > width:
        pairs = [p for p in itertools.permutations(left, 2) if p not in forbidden]
        if not pairs and host:
            lost.add(left.pop(0))
            continue
        if not pairs:
            forbidden, relaxed = set(), True
            continue
        r, c = sorted(min(pairs, key=lambda p: (-value[p], p)))
        before, left = left, [k for k in left if k != c]
        group[c] = r
        for k in left:
            for new, old in (((k, r), (k, c)), ((r, k), (c, k))):
                if k != r:
                    least = min(value[new], value[old])
                    value[new] = a * least if alpha else least
                    forbidden |= {new} & {new if old in forbidden else None}
        for m in {model[r], model[c]} if alpha == 0 and not relaxed else ():
            places = range(sum(sizes[:m]), sum(sizes[: m + 1]))
            columns = [before[p] for p in places if p < len(before)] if host else places
            rows = [left[p] for p in places if p < len(left)] if host else places
            forbidden |= {(k, r) for k in columns} | {(r, k) for k in rows}
        if model[r] == model[c]:
            budget[model[r]] -= 1
            if budget[model[r]] == 0 and not relaxed:
                forbidden |= {(i, j) for i, j in kin if model[i] == model[r]}
    label: dict[int, int] = {}
    numbers = itertools.count()
    for k in range(n):
        label[k] = label[group[k]] if k in group else -1 if k in lost else next(numbers)
    return list(label.values())


def zipit_budget(size: int, models: int, beta: float) -> int:
    """Of each model, where all have `size` features."""
    removed = size * models - size
    return max(1, int((removed // models) * beta + 1e-4))


# ---- cases ---------------------------------------------------------------------------------------

ALPHAS = (1.0, 0.3, 1e-4, 0.0)
SEEDS = 130  # for each alpha


class Zip(NamedTuple):
    x: Tensor
    models: int
    size: int
    alpha: float
    beta: float
    kind: str

    @property
    def sizes(self) -> list[int]:
        return [self.size] * self.models

    @property
    def budgets(self) -> list[int]:
        return [zipit_budget(self.size, self.models, self.beta)] * self.models


@functools.cache
def case(seed: int, alpha: float) -> Zip:
    g = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=g))

    models, beta = (2, 3, 3, 4)[draw(4)], (0.0, 0.075, 0.125, 0.5, 1.0)[draw(5)]
    size = 1 + draw(16)
    n = models * size
    kind = ("normal", "features", "ties", "equal", "negative", "asymmetric")[seed % 6]
    if kind == "features":  # correlations, of dead features and duplicates as well
        rows = torch.randn(n, 6, generator=g)
        rows[::5] = 0
        rows[1::7] = rows[0::7][: len(rows[1::7])]
        x = torch.corrcoef(rows).nan_to_num(0) if n > 1 else torch.ones(1, 1)
    else:
        x = torch.randn(n, n, generator=g)
    if kind == "ties":
        x = x.round() / 4
    elif kind == "equal":
        x = torch.full((n, n), 0.5 * (-1) ** seed)
    elif kind == "negative":
        x = -x.abs()
    if kind != "asymmetric":
        x = torch.minimum(x, x.T)
    return Zip(x, models, size, alpha, beta, kind)


@functools.cache
def expected(seed: int, alpha: float, host: str | None) -> list[int]:
    z = case(seed, alpha)
    return formula(z.x, z.sizes, z.size, alpha, z.budgets, host)


def quiet(z: Zip, host: str | None, backend: str, device: str) -> list[int]:
    """Labels, whatever is lost."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = z.x.to(device)
        got = mk.zip_match(x, z.sizes, alpha=z.alpha, beta=z.beta, host=host, backend=backend)
    assert got.dtype == torch.int64
    assert got.device == x.device
    return got.tolist()


# ---- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [None, "zipit"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_labels_of_the_formula(alpha: float, host: str | None, backend: str, device: str) -> None:
    for seed in range(SEEDS):
        z = case(seed, alpha)
        assert quiet(z, host, backend, device) == expected(seed, alpha, host), (seed, z.kind)


@pytest.mark.parametrize("host", [None, "zipit"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_oracles_agree(alpha: float, host: str | None) -> None:
    for seed in range(SEEDS):
        z = case(seed, alpha)
        out = torch.empty(len(z.x), dtype=torch.int64)
        ends = [m * z.size for m in range(z.models + 1)]
        reference.zip_match([out], [z.x], [ends], [z.size], [z.budgets], alpha, host == "zipit")
        assert out.tolist() == expected(seed, alpha, host), (seed, z.kind)


@zipit.needed
@pytest.mark.parametrize("alpha", ALPHAS)
def test_labels_of_zipit(alpha: float, backend: str, device: str) -> None:
    """As host; and by default wherever ZipIt's code does what it means to."""
    match = zipit.match_tensors_zipit()
    whole = 0
    for seed in range(SEEDS):
        z = case(seed, alpha)
        theirs = zipit.labels(match, z.x, z.models, alpha, z.beta).tolist()
        assert quiet(z, "zipit", backend, device) == theirs, (seed, z.kind)
        if alpha and -1 not in theirs:
            whole += 1
            assert quiet(z, None, backend, device) == theirs, (seed, z.kind)
    assert whole > SEEDS // 2 or not alpha


@pytest.mark.parametrize("alpha", ALPHAS)
def test_many_registers_and_tiles(alpha: float, backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(1)
    for n, sizes in ((159, [79, 80]), (200, [130, 1, 69])):
        x = torch.corrcoef(torch.randn(n, 12, generator=g))
        for matrix in (torch.minimum(x, x.T), torch.randn(n, n, generator=g)):
            out = torch.empty(n, dtype=torch.int64)
            width, ends = max(sizes), [0, *itertools.accumulate(sizes)]
            budgets = [5] * len(sizes)
            reference.zip_match([out], [matrix], [ends], [width], [budgets], alpha, False)
            got = mk.zip_match(
                matrix.to(device), sizes, alpha=alpha, budgets=budgets, backend=backend
            )
            assert_bits_equal(got.cpu(), out)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    """16-bit values are widened; float64 ones are compared and multiplied as such."""
    for seed in range(0, 40, 6):
        z = case(seed, 0.3)
        acc = accumulator(dtype)
        x = (1 + z.x.to(acc) * (2.0**-30 if acc == torch.float64 else 0.25)).to(dtype)
        want = formula(x, z.sizes, z.size, 0.3, z.budgets, None)
        got = mk.zip_match(x.to(device), z.sizes, beta=z.beta, backend=backend)
        assert got.tolist() == want


@pytest.mark.parametrize("layout", [k for k in cases.LAYOUTS if k != "expanded"])
def test_layouts(layout: str, backend: str, device: str) -> None:
    for seed, dtype in ((2, torch.float32), (8, torch.float64), (17, torch.bfloat16)):
        z = case(seed, 0.3)
        x = cases.LAYOUTS[layout](z.x.to(dtype).to(device))
        before = x.clone()
        got = mk.zip_match(x, z.sizes, beta=z.beta, backend=backend)
        assert got.tolist() == formula(x, z.sizes, z.size, 0.3, z.budgets, None)
        assert_bits_equal(x, before)


def test_negative_similarities_rise(backend: str, device: str) -> None:
    """-0.9 between the pair and slot 2 becomes -0.09, and overtakes -0.5."""
    x = torch.tensor(
        [
            [1, 0.5, -0.9, -0.95],
            [0.5, 1, -0.9, -0.95],
            [-0.9, -0.9, 1, -0.5],
            [-0.95, -0.95, -0.5, 1],
        ],
        device=device,
    )
    for alpha, want in ((1.0, [0, 0, 1, 1]), (0.1, [0, 0, 0, 1])):
        got = mk.zip_match(x, [4], out_dim=2, alpha=alpha, budgets=[9], backend=backend)
        assert got.tolist() == want


def test_signed_zeros_tie(backend: str, device: str) -> None:
    x = torch.tensor([[0, -0.0, 0.0], [-0.0, 0, 0.0], [0.0, 0.0, 0]], device=device)
    got = mk.zip_match(x, [1, 2], backend=backend)
    assert got.tolist() == [0, 0, 1]


# ---- budgets, widths, nothing left ---------------------------------------------------------------


def members(labels: Tensor, sizes: list[int]) -> list[list[int]]:
    """The models of each group's features."""
    model = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return [model[labels.cpu() == k].tolist() for k in range(int(labels.max()) + 1)]


def test_a_budget_of_0_forbids_merges_within_a_model(backend: str, device: str) -> None:
    for seed in range(0, 60, 6):
        z = case(seed, 1.0)
        x = case(seed, 1.0).x[: 2 * z.size, : 2 * z.size].to(device)
        got = mk.zip_match(x, [z.size] * 2, budgets=[0, 0], alpha=0, backend=backend)
        assert members(got, [z.size] * 2) == [[0, 1]] * z.size


def test_a_beta_of_0_lets_one_merge_happen(backend: str, device: str) -> None:
    for seed in range(60):
        z = case(seed, 0.3)
        x = z.x.to(device)
        got = mk.zip_match(x, z.sizes, beta=0, backend=backend)
        assert_bits_equal(got, mk.zip_match(x, z.sizes, budgets=[1] * z.models, backend=backend))


def test_budgets_are_for_each_model(backend: str, device: str) -> None:
    """Merges within a model are the best ones, as long as they may happen."""
    x = torch.block_diag(*[torch.ones(4, 4)] * 3).to(device)
    got = mk.zip_match(x, [4, 4, 4], out_dim=9, alpha=1, budgets=[0, 1, 2], backend=backend)
    assert got.tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 7, 8]


def test_where_zipit_loses_features_none_is_lost(backend: str, device: str) -> None:
    lost = 0
    for alpha in ALPHAS:
        for seed in range(SEEDS):
            if -1 in expected(seed, alpha, "zipit"):
                lost += 1
                z = case(seed, alpha)
                got = torch.tensor(quiet(z, None, backend, device))
                assert got.unique().tolist() == list(range(z.size))
    assert lost > 50


def test_a_warning_says_how_many_features_zipit_loses(backend: str, device: str) -> None:
    seed = next(s for s in range(SEEDS) if -1 in expected(s, 0.3, "zipit"))
    z, count = case(seed, 0.3), expected(seed, 0.3, "zipit").count(-1)
    with pytest.warns(RuntimeWarning, match=f"loses {count} features"):
        mk.zip_match(z.x.to(device), z.sizes, beta=z.beta, host="zipit", backend=backend)


def test_any_width(backend: str, device: str) -> None:
    for seed in (0, 1, 2, 3, 5):
        x = case(seed, 0.3).x[:12, :12]
        n = len(x)
        sizes = [n // 3, 0, n - n // 3]
        for width in range(1, n + 1):
            got = mk.zip_match(
                x.to(device), sizes, out_dim=width, budgets=[2, 2, 2], backend=backend
            )
            assert got.tolist() == formula(x, sizes, width, 0.3, [2, 2, 2], None)


def test_unequal_sizes_end_with_the_largest(backend: str, device: str) -> None:
    x = torch.corrcoef(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)))
    got = mk.zip_match(torch.minimum(x, x.T).to(device), [3, 7, 2], backend=backend)
    assert got.unique().tolist() == list(range(7))


@pytest.mark.parametrize(
    ("sizes", "labels"), [([0], []), ([0, 0], []), ([1], [0]), ([0, 1], [0]), ([1, 1], [0, 0])]
)
def test_few_features(sizes: list[int], labels: list[int], backend: str, device: str) -> None:
    x = torch.eye(sum(sizes), device=device)
    got = mk.zip_match(x, sizes, backend=backend)
    assert_bits_equal(got.cpu(), torch.tensor(labels, dtype=torch.int64))


# ---- several matrices, groups --------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_list_is_each_alone(
    threads: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKERN_THREADS", str(threads))
    zips = [case(seed, 0.3) for seed in range(30)]
    got = mk.zip_match(
        [z.x.to(device) for z in zips],
        [z.sizes for z in zips],
        budgets=[z.budgets for z in zips],
        backend=backend,
    )
    for seed, labels in enumerate(got):
        assert labels.tolist() == expected(seed, 0.3, None)


def test_groups_are_matrices_of_their_own(backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.corrcoef(torch.randn(24, 6, generator=g))
    x = torch.minimum(x, x.T).to(device)
    groups = torch.randint(3, (24,), generator=g) * 5 - 1
    widths = [2, 5, 3]
    got = mk.zip_match(x, [10, 14], groups=groups, out_dim=widths, backend=backend)
    sets = set()
    for number, width in zip(groups.unique(), widths):
        where = torch.nonzero(groups == number)[:, 0]
        sizes = [int((where < 10).sum()), int((where >= 10).sum())]
        part = x[where][:, where]
        alone = mk.zip_match(part, sizes, out_dim=width, backend=backend)
        sets |= {tuple(where[alone.cpu() == k].tolist()) for k in range(width)}
    assert sets == {tuple(torch.nonzero(got == k)[:, 0].tolist()) for k in range(10)}
    lowest = [got.tolist().index(k) for k in range(10)]
    assert lowest == sorted(lowest)


def test_one_group_is_none(backend: str, device: str) -> None:
    z = case(7, 0.3)
    x = z.x.to(device)
    for groups in (np.full(len(x), 4), torch.zeros(len(x), dtype=torch.int32)):
        got = mk.zip_match(x, z.sizes, beta=z.beta, groups=groups, backend=backend)
        assert got.tolist() == expected(7, 0.3, None)


def test_groups_of_no_feature(backend: str, device: str) -> None:
    none = [torch.empty(0, dtype=torch.int64, device=device)]
    xs = [torch.eye(0, device=device), torch.eye(1, device=device)]
    got = mk.zip_match(xs, [[0], [1]], groups=[none[0], None], backend=backend)
    assert [labels.tolist() for labels in got] == [[], [0]]


# ---- the door ------------------------------------------------------------------------------------


def test_numpy_input(backend: str) -> None:
    z = case(7, 0.3)
    assert mk.zip_match(z.x.numpy(), z.sizes, beta=z.beta, backend=backend).tolist() == expected(
        7, 0.3, None
    )


X = torch.eye(4)
NAN, INF = X.clone(), X.clone()
NAN[1, 2] = float("nan")
INF[3, 0] = -float("inf")
REFUSALS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "empty": ([], [], {}, "correlation is empty"),
    "no matrix": (X[0], [4], {}, "correlation is no square matrix; got [4]"),
    "not square": ([X, X[1:]], [[4], [3]], {}, "correlation[1] is no square matrix; got [3, 4]"),
    "nan": (NAN, [2, 2], {}, "correlation[1, 2] is not finite; got nan"),
    "infinity": ([X, INF], [[4], [4]], {}, "correlation[1][3, 0] is not finite; got -inf"),
    "integers": (X.int(), [2, 2], {}, "int32"),
    "mixed dtypes": ([X, X.half()], [[4], [4]], {}, "correlation[1] differs from correlation[0]"),
    "no sizes": (X, [], {}, "sizes is empty"),
    "one size": (X, 4, {}, "sizes is no list; got 4"),
    "negative size": (X, [5, -1], {}, "sizes holds no such number; got -1"),
    "sum of sizes": (X, [2, 3], {}, "sizes do not add up; got [2, 3]; expected a sum of 4"),
    "too few sizes": ([X, X], [[4]], {}, "sizes is no list of one for each matrix; got 1"),
    "alpha": (X, [2, 2], {"alpha": 1.5}, "alpha is out of range; got 1.5; expected 0 to 1"),
    "negative alpha": (X, [2, 2], {"alpha": -0.1}, "alpha is out of range"),
    "tiny alpha": (X, [2, 2], {"alpha": 1e-60}, "alpha is 0 in float32"),
    "beta": (X, [2, 2], {"beta": -1}, "beta is out of range; got -1.0; expected 0 to 1"),
    "no number": (X, [2, 2], {"alpha": "x"}, "alpha is no number"),
    "width 0": (X, [2, 2], {"out_dim": 0}, "out_dim is out of range; got 0; expected 1 to 4"),
    "width 5": (X, [2, 2], {"out_dim": 5}, "out_dim is out of range; got 5; expected 1 to 4"),
    "a fraction": (X, [2, 2], {"out_dim": 2.5}, "out_dim holds no such number; got 2.5"),
    "budgets": (X, [2, 2], {"budgets": [1]}, "budgets has the wrong length; got 1; expected 2"),
    "no budget": (X, [2, 2], {"budgets": [1, -1]}, "budgets holds no such number; got -1"),
    "groups": (X, [2, 2], {"groups": [0, 1]}, "groups is no tensor"),
    "shape of groups": (X, [2, 2], {"groups": X[0]}, "groups does not fit; got float32 [4]"),
    "widths of groups": (
        X,
        [2, 2],
        {"groups": torch.tensor([0, 0, 1, 1]), "out_dim": [1]},
        "out_dim has the wrong length; got 1; expected 2",
    ),
    "host": (X, [2, 2], {"host": "mudsc"}, "host is unknown"),
    "host and width": (
        X,
        [2, 2],
        {"host": "zipit", "out_dim": 3},
        "out_dim is unknown to host='zipit'; got 3; expected None",
    ),
    "host and sizes": (X, [1, 3], {"host": "zipit"}, "sizes do not suit host='zipit'; got [1, 3]"),
    "host and no list": (X, 4, {"host": "zipit"}, "sizes is no list"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    x, sizes, kwargs, words = REFUSALS[what]
    with refused(OP, words):
        mk.zip_match(x, sizes, **kwargs)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=name_of)
def test_the_kernel_stays_in_its_scratch(dtype: torch.dtype, cpu_backend: Any) -> None:
    for n in (1, 15, 16, 17, 33):
        identity = torch.eye(n, dtype=dtype)
        x = cpu_backend.matrix(identity)
        nbytes = cpu_backend._cpu.zip_match_scratch(correlation=x)
        scratch = torch.full((nbytes + 64,), 77, dtype=torch.uint8)
        buffer, labels = cases.guarded((n,), torch.int64)
        cpu_backend._cpu.zip_match(
            correlation=x,
            offsets=[0, n // 2, n],
            width=1,
            alpha=0.0,
            budgets=[1, 1],
            zipit=False,
            scratch=scratch.data_ptr(),
            labels=labels.data_ptr(),
        )
        assert cases.untouched(buffer, labels)
        assert not labels.any()
        assert (scratch[nbytes:] == 77).all()


def test_the_kernel_is_the_compiled_one(cpu_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**kwargs: object) -> None:
        raise RuntimeError("this kernel was called")

    monkeypatch.setattr(cpu_backend._cpu, "zip_match", broken)
    with pytest.raises(RuntimeError, match="this kernel was called"):
        mk.zip_match(X, [2, 2], backend="cpu")
