"""Tensors of adapter files: read, checked, put together to factors, written in one go."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..check import FLOATS, name_of
from ..errors import CheckpointError
from .adapter import Factors

_SHOWN = 5  # names in a sentence


class Content(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read(path: Path) -> Content:
    """All tensors of a safetensors file.

    Raises: CheckpointError for a file that cannot be read, a tensor that is not floating (quantised
    weights), NaN and infinities.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: no readable adapter ({reason})") from None
    for name, x in tensors.items():
        if x.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: {name} is not floating, dequantise it first; got {name_of(x.dtype)}"
            )
        if not bool(x.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinities")
    return Content(tensors, metadata)


def paired(
    owner: Path, halves: Mapping[str, Mapping[str, Tensor]], ends: tuple[str, str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Both factors of each module, in the order of names; `ends`: what files call them."""
    found = {}
    for module, pair in sorted(halves.items()):
        missing = [end for end in ends if end not in pair]
        if missing:
            got = "one factor of two" if len(missing) == 1 else "none of two factors"
            raise CheckpointError(f"{owner}: {module} has no {missing[0]}; got {got}")
        found[module] = pair[ends[0]], pair[ends[1]]
    return found


def factors(
    owner: Path,
    module: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    rank: int | None = None,
    *,
    embedding: bool = False,
    bias: Tensor | None = None,
) -> Factors:
    """Of tensors [r, in, ...] and [out, r, 1, ...]; `rank`: what the file says that it is."""
    rank = (len(a) if a.ndim else 0) if rank is None else rank
    fit = a.ndim >= 2 and b.ndim >= 2 and len(a) == b.shape[1] == rank and rank > 0
    if not fit or b.numel() != b.shape[0] * b.shape[1]:
        raise CheckpointError(
            f"{owner}: {module} has factors that do not fit; got {list(a.shape)} and "
            f"{list(b.shape)}; expected [r, in] and [out, r] for r = {rank}"
        )
    if bias is not None and bias.shape != b.shape[:1]:
        raise CheckpointError(
            f"{owner}: {module} has a bias that does not fit; got {list(bias.shape)}; expected "
            f"{list(b.shape[:1])}"
        )
    return Factors(a.flatten(1), b.flatten(1), scale, tuple(a.shape[1:]), embedding, bias)


def stored(f: Factors) -> tuple[Tensor, Tensor]:
    """The factors in the shapes that layers have, in memory of their own, as safetensors wants."""
    kernel = [1] * (len(f.shape) - 1)
    return own(f.a.reshape(f.rank, *f.shape)), own(f.b.reshape(*f.b.shape, *kernel))


def own(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Complete, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda part: save_file(dict(tensors), part, dict(metadata)))


def replace(path: Path, put: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    put(part)
    os.replace(part, path)


def listed(names: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
