"""merge_adapters: several adapters of one base become one, without a matrix of a weight's size."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..engine.defaults import DEFAULT_MEMORY
from ..engine.fold import fold_adapter
from ..errors import ArgumentError
from ..methods import REGISTRY
from ..methods.merge import merge_state_dicts
from . import factors
from .adapter import Adapter, Factors
from .files import load_adapter, save_adapter
from .kohya_file import lasting

OP = "merge_adapters"
_PLAIN = ("cat", "svd")
# Names of the field for methods of the registry.
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

    Merging products is not merging factors: b_1 a_1 + b_2 a_2 has no cross terms b_1 a_2, which
    (b_1 + b_2)(a_1 + a_2) has.
    adapters: what `load_adapter` reads, or `Adapter` objects, of one layout. `rank` truncates every
    module's result; what that leaves out is in the result's `lost`. union: a module that an adapter
    lacks counts as unchanged by it, and bases may have other names; otherwise it is an error that
    lists them. Biases of second factors are added by cat and svd, and refused by others. Whole
    tensors (modules_to_save, biases) must be equal where several adapters have them. weight (1 for
    a method that has one), parameters: those of the method.
    host="knots": the original's absolute cut of singular values, 1e-5, and its rules of signs and
    thresholds.
    into: a base, as in `fold_adapter`; `out` becomes that model with the result in its weights,
    which is not rounded on the way. memory, progress: of that.
    Result: linear algebra in float64 on matrices of the ranks' sum; parts are merged in float32, or
    float64 if an input is; factors have the inputs' dtype. `out` saves it in the inputs' layout.
    Cost: for ranks' sum R two QR of [out, R] and [in, R] and one SVD of [R, R] a module.
    Raises: ArgumentError for unknown methods and parameters, adapters that do not fit together;
    CheckpointError as `load_adapter`.
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
    check.choice(OP, "host", host, (None, "knots"))
    if host is not None and kind != "knots":
        raise ArgumentError.of(OP, f"host={host!r} has no {method}", repr(method), "knots_...")
    given = _fitting(loaded, union)
    saved = _saved(loaded)
    biases: dict[str, Tensor] = {}
    if kind in _PLAIN:
        if parameters:
            raise ArgumentError.of(OP, f"{method} has no such parameters", [*parameters], "weight")
        weights = _weights(1.0 if weight is None else weight, len(loaded))
        pairs = {name: factors.sum_of(fs, weights) for name, fs in given.items()}
        biases = factors.biases_of(given, weights)
        most = max(f.rank for a in loaded for f in a.modules.values())
        if kind == "svd":
            rank = most if rank is None else rank
    else:
        _require_no_biases(given, method)
        its_host = host if host in REGISTRY[inner].parity else None
        arguments = {"seed": seed, "host": its_host, "backend": backend, **parameters}
        if weight is not None or any(p.name == "weight" for p in REGISTRY[inner].parameters):
            arguments["weight"] = 1.0 if weight is None else weight
        merge = _merging(inner, torch.promote_types(_widest(loaded), torch.float32), arguments)
        pairs = (
            _knots(given, merge, _CUT if host else None) if kind == "knots" else _core(given, merge)
        )
    result = Adapter({}, saved, _config(loaded, list(given)), layout=loaded[0].layout)
    dtype = _widest(loaded) if into is None else torch.float64
    for name, (b, a) in pairs.items():
        if rank is not None:
            b, a, result.lost[name] = factors.truncated(b, a, rank)
        result.modules[name] = _factored(given[name][0], b, a, biases.get(name), dtype)
    if into is not None and out is not None:
        settings = {"method": method, "weight": weight, "rank": rank, "host": host, "seed": seed}
        made_by = _described(adapters, {**settings, **parameters})
        fold_adapter(result, into, out, memory=memory, progress=progress, made_by=made_by)
    elif out is not None:
        save_adapter(result, out)
    return result


def _factored(
    like: Factors, b: Tensor, a: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Factors:
    if not len(a):  # nothing is left; PEFT knows no rank 0
        b, a = b.new_zeros(len(b), 1), a.new_zeros(1, a.shape[1])
    bias = None if bias is None else bias.to(dtype)
    return Factors(a.to(dtype), b.to(dtype), 1.0, like.shape, like.embedding, bias)


def _described(adapters: Sequence[Given], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a base with the result in it says of where that is from."""
    paths = ["in memory" if isinstance(x, Adapter) else str(x) for x in adapters]
    return {"adapters": paths, **{k: str(v) for k, v in settings.items() if v is not None}}


Parts = list[dict[str, Tensor]]  # of each adapter, by module
Merging = Callable[[Parts], dict[str, Tensor]]
Pairs = dict[str, tuple[Tensor, Tensor]]


def _method(method: str) -> tuple[str, str]:
    """How task vectors are seen, and the method that merges them."""
    kind, _, inner = method.partition("_")
    inner = _NAMES.get(inner, inner)
    if method in _PLAIN:
        return method, ""
    if kind not in ("knots", "core") or inner not in REGISTRY:
        expected = f"{', '.join(_PLAIN)}, or knots_ or core_ before ta or a method of merge"
        raise ArgumentError.of(OP, "unknown method", repr(method), expected)
    if REGISTRY[inner].base != "required":
        raise ArgumentError.of(
            OP, f"{inner} does not merge task vectors", repr(method), "a method with a base"
        )
    return kind, inner


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


def _fitting(loaded: Sequence[Adapter], union: bool) -> dict[str, list[Factors]]:
    """The factors of each module, one of each adapter."""
    names = sorted({name for a in loaded for name in a.modules})
    problems = []
    given: dict[str, list[Factors]] = {}
    for name in names:
        there = [a.modules[name] for a in loaded if name in a.modules]
        first = there[0]
        missing = [str(i) for i, a in enumerate(loaded) if name not in a.modules]
        if missing and not union:
            problems.append(f"{name} is missing from adapters {', '.join(missing)}")
        sizes = {(len(f.b), f.shape, f.embedding) for f in there}
        if len(sizes) > 1:
            problems.append(f"{name} differs in shape: {sorted(map(str, sizes))}")
        nothing = Factors(first.a[:0], first.b[:, :0], 1.0, first.shape, first.embedding)
        given[name] = [a.modules.get(name, nothing) for a in loaded]
        for i, a in enumerate(loaded):
            if name in a.modules:
                check.finite(OP, f"{name} of adapter {i}", a.modules[name].a)
                check.finite(OP, f"{name} of adapter {i}", a.modules[name].b)
    layouts = {a.layout for a in loaded}
    if len(layouts) > 1:
        what = "adapters name modules in different ways"
        raise ArgumentError.of(OP, what, f"layouts {', '.join(sorted(layouts))}", "one layout")
    bases = {str(a.config.get("base_model_name_or_path") or "") for a in loaded} - {""}
    if len(bases) > 1 and not union:
        problems.append(f"their bases have the names {sorted(bases)}")
    if problems:
        listed = ", ".join(problems)
        raise ArgumentError.of(
            OP, "adapters do not fit together", listed, "the same modules and shapes, or union=True"
        )
    if not given:
        raise ArgumentError.of(OP, "adapters have no modules", "none", "factors of at least one")
    return given


def _require_no_biases(given: Mapping[str, list[Factors]], method: str) -> None:
    biased = sorted(name for name, fs in given.items() if any(f.bias is not None for f in fs))
    if biased:
        what = f"{method} does not say how the biases of second factors merge"
        raise ArgumentError.of(OP, what, ", ".join(biased), "none, or cat or svd, which add them")


def _config(loaded: Sequence[Adapter], modules: list[str]) -> dict[str, Any]:
    """The first adapter's settings, with what PEFT has to look for in those of all."""
    config = dict(loaded[0].config)
    if "metadata" in config:
        config["metadata"] = lasting(config["metadata"])
    for key in ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules"):
        if any(a.config.get(key) != config.get(key) for a in loaded):
            config |= {"target_modules": modules, "layers_to_transform": None}
            config |= {"layers_pattern": None, "exclude_modules": None}
            break
    if "components" in config:  # of diffusers; what is written names its modules itself
        settings = config["components"].items()
        config["components"] = {
            component: {k: v for k, v in each.items() if k != "target_modules"}
            for component, each in settings
        }
    wholes = [name for a in loaded for name in a.config.get("modules_to_save") or ()]
    if wholes:
        config["modules_to_save"] = sorted(set(wholes))
    return config


def _saved(loaded: Sequence[Adapter]) -> dict[str, Tensor]:
    """The tensors that are not factored, which nobody says how to merge."""
    saved: dict[str, Tensor] = {}
    for i, adapter in enumerate(loaded):
        for name, x in adapter.saved.items():
            if name in saved and not torch.equal(saved[name], x):
                raise ArgumentError.of(
                    OP, f"{name} is saved whole by several adapters", f"another one in {i}", "equal"
                )
            saved[name] = x
    return saved


def _widest(loaded: Sequence[Adapter]) -> torch.dtype:
    dtype = loaded[0].dtype()
    for adapter in loaded[1:]:
        dtype = torch.promote_types(dtype, adapter.dtype())
    return dtype


def _weights(weight: float | Sequence[float], n: int) -> list[float]:
    return check.numbers(
        OP, "weight", [weight] * n if isinstance(weight, (int, float)) else weight, n
    )
