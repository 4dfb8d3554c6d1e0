"""merge_adapters: several adapters of one base become one, without a matrix of a weight's size."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import check
from ..engine.defaults import DEFAULT_MEMORY
from ..engine.fold import fold_adapter
from ..errors import ArgumentError
from ..methods import REGISTRY
from ..methods.merge import merge_state_dicts
from . import combine, factors, fit
from .adapter import Adapter, Factors
from .files import load_adapter, save_adapter
from .fit import OP

_PLAIN = ("cat", "svd")
# Names of the field for methods of the registry, behind knots_ and core_.
_NAMES = {"ta": "task_arithmetic", "ties": "ties_global"}
_CUT = 1e-5  # of singular values, absolute, in the code of KnOTS
Given = str | os.PathLike[str] | Adapter


def merge_adapters(
    adapters: Sequence[Given],
    method: str = "knots_ties",
    *,
    out: str | os.PathLike[str] | None = None,
    into: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    union: bool = False,
    host: str | None = None,
    seed: int = 0,
    weight: float | Sequence[float] | None = None,
    backend: str = "auto",
    memory: int | str = DEFAULT_MEMORY,
    progress: bool = False,
    **parameters: Any,
) -> Adapter:
    """One adapter whose task vectors merge those of several, module by module.

    With task vectors d_i = scale_i b_i a_i of a module:

    - cat: sum_i weight_i d_i, exactly, with the ranks' sum as rank.
    - svd: the same, truncated; `rank` is by default the largest rank of the inputs.
    - knots_M: [d_1 ... d_n] = u diag(s) [v_1 ... v_n]^T, d = u merged, where the parts
      diag(s) v_i^T of all modules are merged by method M of the registry from a base of zeros;
      knots_ties takes one threshold over all modules (`ties_global`), as KnOTS does.
    - core_M: d_i = u m_i v^T in bases of all second and of all first factors; the cores m_i are
      merged by M (Core Space).
    - M_svd: the d_i themselves are merged by M, and truncated as svd does. A module at a time they
      are formed in float64 and rounded once; M is not one that surveys all modules first.
    - linear, ties, dare_linear, dare_ties, magnitude_prune: PEFT's of these names. First and second
      factors, of equal ranks, are merged apart, with sqrt|weight_i scale_i| on each and the sign on
      the first ones.

    Merging factors is not merging products: with w_i = weight_i scale_i `linear` is svd's sum of
    w_i b_i a_i and the cross terms sqrt(w_i w_j) b_i a_j, i != j, of
    (sum_i sqrt(w_i) b_i)(sum_j sqrt(w_j) a_j), about as large between unrelated adapters.
    adapters: what `load_adapter` reads, or `Adapter` objects, of one layout. `rank` truncates every
    module's result; what that leaves out is in the result's `lost`. union: a module that an adapter
    lacks counts as unchanged by it, and bases may have other names; otherwise it is an error that
    lists them. Biases of second factors are added by cat and svd, and refused by others. Whole
    tensors (modules_to_save, biases) must be equal where several adapters have them. weight (1 for
    a method that has one), parameters: those of the method.
    host="knots": the original's absolute cut of singular values, 1e-5, and its rules of signs and
    thresholds. host="peft": its rules for PEFT's names, as `merge_tensors` has them; random masks
    are drawn from torch's generator, in order of the modules' names.
    into: a base, as in `fold_adapter`; `out` becomes that model with the result in its weights,
    which is not rounded on the way. memory, progress: of that.
    Result: linear algebra in float64 on matrices of the ranks' sum; parts are merged in float32, or
    float64 if an input is; factors have the inputs' dtype, and of float16 the scale holds powers of
    two, so that their range cuts off nothing. `out` saves it in the inputs' layout.
    Cost: for ranks' sum R two QR of [out, R] and [in, R] and one SVD of [R, R] a module; M_svd that
    of M on [out, in] and of `truncation.best_of_rank`.
    Raises: ArgumentError for unknown methods and parameters, adapters that do not fit together,
    results beyond their dtype; CheckpointError as `load_adapter`.
    Source: KnOTS (Stoica et al., 2410.19735), Core Space (Panariello et al., 2509.17786), PEFT
    `add_weighted_adapter`.

    >>> import torch
    >>> from mergekern.adapters.adapter import Factors
    >>> b, rows = torch.ones(3, 1), (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    >>> two = [Adapter({"fc": Factors(a, b, shape=(2,))}) for a in rows]
    >>> merge_adapters(two, "svd").modules["fc"].delta()[0].round(decimals=6)
    tensor([1., 2.], dtype=torch.float64)
    """
    kind, inner = _method(method)
    if into is not None and out is None:
        raise ArgumentError.of(OP, "into needs out", "none", "a folder to make")
    loaded = [x if isinstance(x, Adapter) else load_adapter(x) for x in adapters]
    if not loaded:
        raise ArgumentError.of(OP, "adapters is empty", "none", "at least one")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ArgumentError.of(OP, "rank is no rank", repr(rank), "1 or more")
    _check_host(host, method, kind, inner)
    given = fit.fitting(loaded, union)
    saved = fit.saved(loaded, given)
    if inner == "task_arithmetic" and kind not in _PLAIN and "density" in parameters:
        raise ArgumentError.of(OP, f"{method} trims nothing", "a density", "none, or ..._ties")
    if kind in _PLAIN:
        if parameters:
            raise ArgumentError.of(OP, f"{method} has no such parameters", [*parameters], "weight")
    else:
        _require_no_biases(given, method)
    its_host = host if host in REGISTRY[inner].parity else None
    arguments = {"seed": seed, "host": its_host, "backend": backend, **parameters}
    if weight is not None or any(p.name == "weight" for p in REGISTRY[inner].parameters):
        arguments["weight"] = 1.0 if weight is None else weight
    within = torch.promote_types(fit.widest(loaded), torch.float32)
    if rank is None and kind in ("svd", "dense"):
        rank = max(f.rank for a in loaded for f in a.modules.values())
    cut = _CUT if host == "knots" else None
    merged = _merged(kind, inner, given, rank, within, arguments, cut)
    result = Adapter({}, saved, fit.config(loaded, list(given)), layout=loaded[0].layout)
    dtype = fit.widest(loaded) if into is None else torch.float64
    for name, (b, a, lost) in merged.factors.items():
        bias = merged.biases.get(name)
        result.modules[name] = _factored(name, given[name][0], b, a, bias, dtype)
        if rank is not None:
            result.lost[name] = lost
    if into is not None and out is not None:
        settings = {"method": method, "weight": weight, "rank": rank, "host": host, "seed": seed}
        made_by = _described(adapters, {**settings, **parameters})
        fold_adapter(result, into, out, memory=memory, progress=progress, made_by=made_by)
    elif out is not None:
        save_adapter(result, out)
    return result


def _described(adapters: Sequence[Given], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a base with the result in it says of where that is from."""
    paths = ["in memory" if isinstance(x, Adapter) else str(x) for x in adapters]
    return {"adapters": paths, **{k: str(v) for k, v in settings.items() if v is not None}}


Parts = list[dict[str, Tensor]]  # of each adapter, by module
Merging = Callable[[Parts], dict[str, Tensor]]
Pairs = dict[str, tuple[Tensor, Tensor]]


class Merged(NamedTuple):
    """By module b, a and what they lost of b @ a by truncation; biases where there are any."""

    factors: dict[str, tuple[Tensor, Tensor, float]]
    biases: dict[str, Tensor]


def _factored(
    name: str, like: Factors, b: Tensor, a: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Factors:
    if not len(a):  # nothing is left; PEFT knows no rank 0
        b, a = b.new_zeros(len(b), 1), a.new_zeros(1, a.shape[1])
    power = 0
    if dtype == torch.float16 and bias is None:  # the scale holds what its range would cut off
        (b, one), (a, other) = _near_1(b), _near_1(a)
        power = one + other
    parts = {"a": a, "b": b} | ({} if bias is None else {"bias": bias})
    narrow = {part: x.to(dtype) for part, x in parts.items()}
    for part, x in narrow.items():
        if not check.is_finite(x):
            what = f"{part} of the merged {name} does not fit {check.name_of(dtype)}"
            got = f"{float(parts[part].abs().max()):.3g}"
            raise ArgumentError.of(OP, what, got, "finite numbers, or adapters in a wider dtype")
    scale, its = 2.0**power, narrow.get("bias")
    return Factors(narrow["a"], narrow["b"], scale, like.shape, like.embedding, its)


def _near_1(x: Tensor) -> tuple[Tensor, int]:
    """x over a power of two, its largest magnitude in [0.5, 1), and that power."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    power = math.frexp(largest)[1] if math.isfinite(largest) else 0
    return x * 2.0**-power, power


def _method(method: str) -> tuple[str, str]:
    """How task vectors are seen, and the method that merges them."""
    if method in _PLAIN:
        return method, "task_arithmetic"
    if method in combine.FACTORED:
        return "factored", combine.FACTORED[method]
    kind, _, inner = method.partition("_")
    if kind in ("knots", "core"):
        inner = _NAMES.get(inner, inner)
    elif method.endswith("_svd"):
        kind, inner = "dense", method.removesuffix("_svd")
    if kind not in ("knots", "core", "dense") or inner not in REGISTRY:
        known = ", ".join((*_PLAIN, *combine.FACTORED))
        expected = f"{known}, or knots_ or core_ before ta or a method of merge, or _svd behind one"
        raise ArgumentError.of(OP, "unknown method", repr(method), expected)
    spec = REGISTRY[inner]
    if spec.base != "required":
        raise ArgumentError.of(
            OP, f"{inner} does not merge task vectors", repr(method), "a method with a base"
        )
    if kind == "dense" and (spec.survey or spec.whole_models or spec.tensor_valued):
        raise ArgumentError.of(
            OP,
            f"{inner} wants more than one module at a time",
            repr(method),
            f"knots_{inner} or core_{inner}",
        )
    return kind, inner


def _check_host(host: str | None, method: str, kind: str, inner: str) -> None:
    check.choice(OP, "host", host, (None, "knots", "peft"))
    has, names = kind == "knots", "knots_..."
    if host == "peft":
        has = kind not in ("knots", "core") and "peft" in REGISTRY[inner].parity
        names = ", ".join((*_PLAIN, *combine.FACTORED)) + ", also with _svd"
    if host is not None and not has:
        raise ArgumentError.of(OP, f"host={host!r} has no {method}", repr(method), names)


def _merged(
    kind: str,
    inner: str,
    given: Mapping[str, list[Factors]],
    rank: int | None,
    dtype: torch.dtype,
    arguments: Mapping[str, Any],
    cut: float | None,
) -> Merged:
    biases: dict[str, Tensor] = {}
    if kind == "dense":
        assert rank is not None  # a default of merge_adapters
        return Merged(combine.dense(given, inner, rank, dtype, arguments), biases)
    if kind in _PLAIN or kind == "factored":
        weights = _weights(arguments["weight"], len(next(iter(given.values()))))
    if kind in _PLAIN:
        pairs = {name: factors.sum_of(fs, weights) for name, fs in given.items()}
        biases = factors.biases_of(given, weights)
    elif kind == "factored":
        pairs = combine.factored(given, inner, weights, dtype, arguments)
    else:
        merge = _merging(inner, dtype, arguments)
        pairs = _knots(given, merge, cut) if kind == "knots" else _core(given, merge)
    if rank is None:
        return Merged({name: (b, a, 0.0) for name, (b, a) in pairs.items()}, biases)
    cut_off = {name: factors.truncated(b, a, rank) for name, (b, a) in pairs.items()}
    return Merged(cut_off, biases)


def _merging(inner: str, dtype: torch.dtype, arguments: Mapping[str, Any]) -> Merging:
    def merge(parts: Parts) -> dict[str, Tensor]:
        narrow = [{name: x.to(dtype) for name, x in of.items()} for of in parts]
        zeros = {name: torch.zeros_like(x) for name, x in narrow[0].items()}
        return merge_state_dicts(narrow, inner, base=zeros, **arguments)

    return merge


def _knots(given: Mapping[str, list[Factors]], merge: Merging, cut: float | None) -> Pairs:
    aligned = {name: factors.align(fs, cut) for name, fs in given.items()}
    n = len(next(iter(given.values())))
    merged = merge([{name: x.parts[i] for name, x in aligned.items()} for i in range(n)])
    return {name: (x.u, merged[name].double()) for name, x in aligned.items()}


def _core(given: Mapping[str, list[Factors]], merge: Merging) -> Pairs:
    spaces = {name: factors.core_space(fs) for name, fs in given.items()}
    n = len(next(iter(given.values())))
    merged = merge([{name: x.parts[i] for name, x in spaces.items()} for i in range(n)])
    return {name: (x.u @ merged[name].double(), x.v.T) for name, x in spaces.items()}


def _require_no_biases(given: Mapping[str, list[Factors]], method: str) -> None:
    biased = sorted(name for name, fs in given.items() if any(f.bias is not None for f in fs))
    if biased:
        what = f"{method} does not say how the biases of second factors merge"
        raise ArgumentError.of(OP, what, ", ".join(biased), "none, or cat or svd, which add them")


def _weights(weight: float | Sequence[float], n: int) -> list[float]:
    return check.numbers(
        OP, "weight", [weight] * n if isinstance(weight, (int, float)) else weight, n
    )
