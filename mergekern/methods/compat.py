"""Whether the tensors of several models fit together, name by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..check import FLOATS, FLOATS8, name_of
from ..errors import ArgumentError


class Signature(NamedTuple):
    """What must agree between models."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: Any) -> Signature:
        return cls(x.dtype, x.shape)

    def dtype_class(self) -> str:
        """Floating types merge with each other; any other type only with itself."""
        return "floating" if self.dtype in (*FLOATS, *FLOATS8) else name_of(self.dtype)


def identical(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one signature hold the same bytes (any dtype, NaN included)."""
    a, b = (t.contiguous().view(-1).view(torch.uint8) for t in (x, y))
    return torch.equal(a, b)


def agree(models: Mapping[str, Mapping[str, Signature]]) -> dict[str, str]:
    """Tensor name -> what is wrong with it; empty if all models fit. Keys name the models."""
    names: dict[str, None] = {}
    for signatures in models.values():
        names.update(dict.fromkeys(signatures))
    problems = {}
    for name in names:
        missing = [label for label, s in models.items() if name not in s]
        if missing:
            problems[name] = f"missing from {', '.join(missing)}"
            continue
        for what, of in (
            ("shape", lambda s: str(list(s.shape))),
            ("dtype", Signature.dtype_class),
        ):
            found = {label: of(s[name]) for label, s in models.items()}
            if len(set(found.values())) > 1:
                listed = ", ".join(f"{value} in {label}" for label, value in found.items())
                problems[name] = f"{what} differs: {listed}"
                break
    return problems


def _alike(x: Any, y: Any) -> bool:
    return x is not None and x.dtype == y.dtype and x.shape == y.shape


def require_fit(op: str, models: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether the tensors agree by name, and those that are not floating in every bit.

    A signature may stand for a tensor that is floating.

    Raises: ArgumentError with all that do not.
    """
    first, *others = models.values()
    equal = {key for key, x in first.items() if all(_alike(d.get(key), x) for d in others)}
    problems = agree(
        {
            label: {key: Signature.of(x) for key, x in d.items() if key not in equal}
            for label, d in models.items()
        }
    )
    for key, x in first.items():
        if key not in problems and x.dtype not in FLOATS:
            differing = [label for label, d in models.items() if not identical(d[key], x)]
            if differing:
                problems[key] = f"values differ in {', '.join(differing)}; it cannot be averaged"
    if problems:
        lines = "; ".join(f"{key}: {what}" for key, what in problems.items())
        raise ArgumentError(f"{op}: {len(problems)} tensors do not fit: {lines}")
