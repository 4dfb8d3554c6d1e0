"""What a report is made of: a few numbers of every slice, added up tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...methods.registry import Inputs, Method
from ...ops.gram import gram
from ...ops.merge_deltas import count_kept

Row = dict[str, list[float]]


def numbers(inputs: Inputs, arguments: Mapping[str, Any], method: Method, result: Tensor) -> Row:
    """The numbers of one slice; those of a tensor are the sums over its slices (`added`).

    elements: per model, the elements it has here. A model that lacks the tensor (`inputs.models`)
    counts 0 in this and in every list below, if a model after it has the tensor.
    task_vectors: <x_i - base, x_j - base>, the n x n matrix row by row; without a base that is
    subtracted there is `models` instead: <x_i, x_j>.
    merged: [|result - base|^2], or [|result|^2].
    With a base, conflicts: [places where kept elements of task vectors have both signs]; and kept:
    per model, the elements of the task vector that the method keeps, unless that is not known
    (`Method.kept`), where all count as kept for `conflicts`.

    Result: counts exact. Products as of `gram`, in float64; NaN and infinity propagate.
    Cost: two reads of the inputs, one of the result; what `Method.kept` takes, which is nothing
    where `inputs.survey` holds its thresholds.
    """
    return numbers_of_slices(inputs, arguments, method, result, [(0, result.numel())])[0]


def numbers_of_slices(
    inputs: Inputs,
    arguments: Mapping[str, Any],
    method: Method,
    result: Tensor,
    ranges: Sequence[tuple[int, int]],
) -> list[Row]:
    """`numbers` of several slices that are in memory together, by flat index into `inputs`.

    Each is what `numbers` finds of the slice by itself, to the bit.
    """
    keep = None
    if inputs.base is not None and method.kept is not None:
        keep = method.kept(inputs, **arguments)
    xs = [x.reshape(-1) for x in inputs.xs]
    base = None if inputs.base is None else inputs.base.reshape(-1)
    merged = result.reshape(-1)
    rows = []
    for first, last in ranges:
        part = slice(first, last)
        origin = None if base is None else base[part]
        dots = gram([x[part] for x in xs], base=origin, backend=inputs.backend)
        row = _spread(inputs, last - first, dots, "models" if base is None else "task_vectors")
        row["merged"] = [_square(merged[part], origin, inputs.backend)]
        if base is not None:
            counts = count_kept(
                base,
                xs,
                keep,
                rounded=inputs.host == "mergekit",
                first=first,
                last=last,
                backend=inputs.backend,
            )
            row["conflicts"] = [float(counts.conflicts)]
            if keep is not None:
                row["kept"] = _placed(inputs, counts.kept)
        rows.append(row)
    return rows


def _spread(inputs: Inputs, elements: int, dots: Tensor, name: str) -> Row:
    """Elements and dot products, those of absent models zero."""
    present = _present(inputs)
    whole = torch.zeros(present[-1] + 1, present[-1] + 1, dtype=torch.float64)
    at = torch.tensor(present)
    whole[at[:, None], at] = dots.cpu()
    count = _placed(inputs, [elements] * len(present))
    return {"elements": count, name: whole.view(-1).tolist()}


def _present(inputs: Inputs) -> list[int]:
    return list(range(len(inputs.xs)) if inputs.models is None else inputs.models)


def _placed(inputs: Inputs, values: Sequence[float]) -> list[float]:
    """A value per model, 0 for those that are absent."""
    present = _present(inputs)
    placed = [0.0] * (present[-1] + 1)
    for i, value in zip(present, values, strict=True):
        placed[i] = float(value)
    return placed


def _square(x: Tensor, base: Tensor | None, backend: str) -> float:
    """|x - base|^2, whatever their dtypes."""
    if base is not None and base.dtype != x.dtype:
        wide = torch.promote_types(base.dtype, x.dtype)
        x, base = x.to(wide), base.to(wide)
    return float(gram([x], base=base, backend=backend))


def added(row: Row, more: Row) -> Row:
    """The numbers of a tensor with those of one more slice.

    >>> added({"merged": [1.0]}, {"merged": [2.0]})
    {'merged': [3.0]}
    """
    return {k: [a + b for a, b in zip(row[k], v, strict=True)] for k, v in more.items()}
