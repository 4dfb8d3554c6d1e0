"""PEFT's adapter merging by mergekern: `with accelerated(): model.add_weighted_adapter(...)`.

`install` replaces the five functions that `peft.tuners.lora.model` binds, the same five and
`magnitude_based_pruning` in `peft.utils.merge_utils` (so `prune` as well); `uninstall` puts PEFT's
own back. The other names of merge_utils stay: each is one or two elementwise steps on tensors that
exist already, so there is nothing to gain. A name that was imported before `install` stays PEFT's.

Equal to PEFT 0.21, for finite values and up to four task tensors (torch sums more in an order of
its own): every bit where PEFT computes in float32 or float64, random draws included, unless a trim
has to choose among equal magnitudes; lowest index first here, undefined there. Where PEFT rounds
products to 16 bits (16-bit weights) there is one rounding here, to PEFT's result type.

What mergekern does not serve goes to PEFT's own function, counted in `fallbacks` with its reason;
`served` counts the rest.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import dispatch
from ..check import FLOATS, accumulator, name_of
from ..errors import BackendError
from ..keep import NOTHING, Keep
from ..ops.kth_magnitude import kth_magnitude
from ..ops.merge_deltas import merge_deltas
from ._pieces import packed, pieces, unpacked

SUPPORTED = ((0, 19), (0, 22))  # first version, and the first one after the last

served: Counter[str] = Counter()
fallbacks: Counter[tuple[str, str]] = Counter()

_UTILS = "peft.utils.merge_utils"
_LORA = "peft.tuners.lora.model"
_originals: dict[tuple[str, str], Callable[..., Any]] = {}
_ELECT = {"total": "sum", "frequency": "count"}

# ---- switching -------------------------------------------------------------------------------


def install() -> None:
    """Replace PEFT's functions by those below; does nothing where that is done already.

    Raises: BackendError if PEFT is missing or of a version this file was not compared with.
    """
    if _originals:
        return
    _check_version()
    found = {}
    for module in (_UTILS, _LORA):
        names = _FUNCTIONS if module == _UTILS else _FUNCTIONS.keys() - {"magnitude_based_pruning"}
        for name in names:
            found[module, name] = getattr(importlib.import_module(module), name)
    _originals.update(found)
    for module, name in found:
        setattr(importlib.import_module(module), name, _FUNCTIONS[name])


def uninstall() -> None:
    """Put PEFT's own functions back; does nothing where they are."""
    while _originals:
        (module, name), function = _originals.popitem()
        setattr(importlib.import_module(module), name, function)


@contextmanager
def accelerated() -> Iterator[None]:
    """PEFT by mergekern inside the block, as it was before afterwards, whatever happens inside."""
    before = bool(_originals)
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def _check_version() -> None:
    low, high = (".".join(map(str, v)) for v in SUPPORTED)
    need = f"peft: this drop-in needs peft >= {low}, < {high}"
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise BackendError(f"{need}; it is not installed (pip install 'peft<{high}')") from None
    major, minor = (int(part) for part in version.split(".")[:2])
    if not SUPPORTED[0] <= (major, minor) < SUPPORTED[1]:
        raise BackendError(f"{need}; got {version}")


# ---- PEFT's functions ------------------------------------------------------------------------


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """out = sum_i w_i x_i.

    Source: PEFT `task_arithmetic`.
    """
    reason = _why_not(task_tensors, weights)
    if reason:
        return _theirs("task_arithmetic", reason)(task_tensors, weights)
    served["task_arithmetic"] += 1
    return _weighted(task_tensors, weights)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """out = sum_i w_i trim_i(x_i), a trim keeping the int(density * numel) largest magnitudes.

    Source: PEFT `magnitude_prune`.
    """
    reason = _why_not(task_tensors, weights, density)
    if reason:
        return _theirs("magnitude_prune", reason)(task_tensors, weights, density)
    served["magnitude_prune"] += 1
    return _weighted(task_tensors, weights, _trims(task_tensors, density))


def ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Tensor:
    """out = sum of w_i trim_i(x_i) over the models of the elected sign, over their number.

    Votes are the trimmed x_i, before weights; a vote of 0 elects +.
    Source: PEFT `ties`.
    """
    reason = _why_not(task_tensors, weights, density, majority_sign_method)
    if reason:
        return _theirs("ties", reason)(task_tensors, weights, density, majority_sign_method)
    served["ties"] += 1
    return _elected(task_tensors, weights, majority_sign_method, _trims(task_tensors, density))


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """out = sum_i w_i drop_i(x_i) / density, drawn from torch's global generator as PEFT draws.

    Source: PEFT `dare_linear`.
    """
    reason = _why_not(task_tensors, weights, density) or _why_not_drawn(task_tensors, density)
    if reason:
        return _theirs("dare_linear", reason)(task_tensors, weights, density)
    served["dare_linear"] += 1
    merge = functools.partial(_weighted, weights=weights)
    return _dropped(task_tensors, density, _product_dtype(task_tensors[0], weights), merge)


def dare_ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Tensor:
    """`ties` of drop_i(x_i) / density, drawn from torch's global generator as PEFT draws.

    Source: PEFT `dare_ties`.
    """
    reason = _why_not(task_tensors, weights, density, majority_sign_method)
    reason = reason or _why_not_drawn(task_tensors, density)
    if reason:
        return _theirs("dare_ties", reason)(task_tensors, weights, density, majority_sign_method)
    served["dare_ties"] += 1
    merge = functools.partial(_elected, weights=weights, method=majority_sign_method)
    return _dropped(task_tensors, density, _mean_dtype(task_tensors[0], weights), merge)


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """The int(density * numel) largest magnitudes of `tensor`, 0 elsewhere (PEFT: -0 or 0).

    Source: PEFT `magnitude_based_pruning`.
    """
    reason = _why_not([tensor], None, density)
    if reason is None and density > 1:
        reason = "a density above 1"
    if reason:
        return _theirs("magnitude_based_pruning", reason)(tensor, density)
    served["magnitude_based_pruning"] += 1
    return merge_deltas(None, [tensor], [1.0], keep=[_trim(tensor, density)])


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        task_arithmetic,
        magnitude_prune,
        ties,
        dare_linear,
        dare_ties,
        magnitude_based_pruning,
    )
}


def _theirs(name: str, reason: str) -> Callable[..., Tensor]:
    """PEFT's own function; the call is counted."""
    fallbacks[name, reason] += 1
    found = _originals.get((_UTILS, name))
    return found or getattr(importlib.import_module(_UTILS), name)


# ---- what goes to PEFT's own function --------------------------------------------------------


def _why_not(xs: Any, weights: Any, density: Any = 0.5, method: Any = "total") -> str | None:
    """None, or why mergekern does not serve this call. Wrong arguments are PEFT's to refuse."""
    if not isinstance(xs, list | tuple) or not xs:
        return "task_tensors is no list of tensors"
    tensors = [*xs, *([] if weights is None else [weights])]
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return "no plain tensor"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "a gradient is wanted: call under torch.no_grad()"
    first = xs[0]
    if first.is_meta or first.layout != torch.strided:
        return "tensors without plain data"
    if any((x.shape, x.dtype, x.device) != (first.shape, first.dtype, first.device) for x in xs):
        return "task tensors of unequal shape, dtype or device"
    if first.dtype not in FLOATS:
        return f"dtype {name_of(first.dtype)}"
    if not first.numel():
        return "empty tensors"
    kernel = dispatch.select("auto", "merge_deltas", first.device, first.dtype)
    if first.device.type != "cpu" and kernel == "torch":
        return f"no kernel for {first.device.type}"
    if not isinstance(density, int | float) or not density >= 0 or method not in _ELECT:
        return "arguments that PEFT refuses"
    return None if weights is None else _why_not_weights(first, weights, len(xs))


def _why_not_weights(first: Tensor, weights: Tensor, n: int) -> str | None:
    if weights.shape != (n,) or weights.device != first.device or weights.is_complex():
        return "weights of another shape, device or kind"
    if accumulator(_mean_dtype(first, weights)) != accumulator(first.dtype):
        return "weights wider than the task tensors"
    return None if bool(weights.isfinite().all()) else "weights that are not finite"


def _why_not_drawn(xs: list[Tensor], density: float) -> str | None:
    if density == 0:
        return "a density of 0, which PEFT divides by"
    return None if xs[0].device.type == "cpu" else "random draws of another device"


# ---- how it is computed ----------------------------------------------------------------------


def _product_dtype(x: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, weights.dtype)


def _mean_dtype(x: Tensor, weights: Tensor) -> torch.dtype:
    """PEFT divides by a count, which is of torch's default type."""
    return torch.promote_types(_product_dtype(x, weights), torch.get_default_dtype())


def _trim(x: Tensor, density: float) -> Keep:
    k = int(density * x.numel())
    if k == x.numel():
        return None
    return kth_magnitude(x, k) if k else NOTHING


def _trims(xs: list[Tensor], density: float) -> list[Keep]:
    return [None] * len(xs) if _unpruned(xs, density) else [_trim(x, density) for x in xs]


def _unpruned(xs: list[Tensor], density: float) -> bool:
    """Whether nothing is pruned; PEFT's own `prune` warns of it then, once per tensor."""
    if density < 1:
        return False
    prune = importlib.import_module(_UTILS).prune
    for x in xs:
        prune(x, density, method="magnitude")
    return True


def _weighted(
    xs: list[Tensor],
    weights: Tensor,
    keep: list[Keep] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    dtype = _product_dtype(xs[0], weights)
    return merge_deltas(None, xs, weights.tolist(), keep=keep, out_dtype=dtype, out=out)


def _elected(
    xs: list[Tensor],
    weights: Tensor,
    method: str,
    keep: list[Keep] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    return merge_deltas(
        None,
        xs,
        weights.tolist(),
        keep=keep,
        elect=_ELECT[method],
        zero="positive",
        weigh="after",
        normalize="count",
        out_dtype=_mean_dtype(xs[0], weights),
        out=out,
    )


def _dropped(
    xs: list[Tensor], density: float, dtype: torch.dtype, merge: Callable[..., Tensor]
) -> Tensor:
    """`merge` of what PEFT's draws leave of each tensor, piece by piece, in PEFT's arithmetic.

    All draws of a tensor come before those of the next, so they are stored, a bit per element.
    """
    out = torch.empty(xs[0].shape, dtype=dtype)
    if _unpruned(xs, density):
        return merge(xs, out=out)
    parts = pieces(xs)
    masks = [[_draw(p.size, density, x.dtype) for p in parts] for x in xs]
    for i, p in enumerate(parts):
        kept = [p.of(x) * unpacked(m[i], p.size, x.dtype) for x, m in zip(xs, masks)]
        merge([x / density for x in kept], out=p.of(out))
    return out


def _draw(n: int, density: float, dtype: torch.dtype) -> np.ndarray:
    return packed(torch.bernoulli(torch.full((n,), density, dtype=dtype)))
