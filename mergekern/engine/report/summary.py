"""The numbers of all tensors as arrays, and what follows from them: norms, cosines, shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..parameters import layer_of
from .numbers import Row

Array = np.ndarray


@dataclass(frozen=True)
class Layer:
    """All tensors of one layer of a stack."""

    stack: str
    number: int
    tensors: tuple[int, ...]  # indices into `Summary.keys`

    @property
    def name(self) -> str:
        return f"{self.stack}{self.number}"


@dataclass(frozen=True)
class Summary:
    """T tensors of n models. What is compared are task vectors, or without a base the models."""

    keys: tuple[str, ...]
    models: tuple[str, ...]
    compared: str  # "task vectors" or "models"
    elements: Array  # [T, n], 0 where a model lacks the tensor
    dots: Array  # [T, n, n]
    merged: Array  # [T], norm of what was made of them
    conflicts: Array | None  # [T]
    kept: Array | None  # [T, n]

    @cached_property
    def present(self) -> Array:
        return self.elements > 0

    @cached_property
    def sizes(self) -> Array:
        return self.elements.max(1, initial=0)

    @cached_property
    def norms(self) -> Array:
        """[T, n], NaN where a model lacks the tensor."""
        squares = np.diagonal(self.dots, axis1=1, axis2=2)
        return np.where(self.present, np.sqrt(squares), np.nan)

    @cached_property
    def means(self) -> Array:
        """[T], norm of the mean of those present; rounding may leave a sum below zero."""
        total = np.maximum(self.dots.sum((1, 2)), 0)
        return _ratio(np.sqrt(total), self.present.sum(1))

    @cached_property
    def conflict_shares(self) -> Array | None:
        return None if self.conflicts is None else _ratio(self.conflicts, self.sizes)

    @cached_property
    def kept_shares(self) -> Array | None:
        return None if self.kept is None else _ratio(self.kept, self.elements)

    @cached_property
    def least_cosines(self) -> Array:
        """[T], of two different models in each tensor; NaN where no two have one."""
        cosines = _ratio(self.dots, self.norms[:, :, None] * self.norms[:, None, :])
        rows, columns = np.triu_indices(len(self.models), 1)
        least = np.nan_to_num(cosines[:, rows, columns], nan=np.inf).min(1, initial=np.inf)
        return np.where(np.isinf(least), np.nan, least)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Stack by stack as they come, and in each by number."""
        found: dict[str, dict[int, list[int]]] = {}
        for t, key in enumerate(self.keys):
            if (place := layer_of(key)) is not None:
                found.setdefault(place[0], {}).setdefault(place[1], []).append(t)
        return tuple(
            Layer(stack, number, tuple(numbers[number]))
            for stack, numbers in found.items()
            for number in sorted(numbers)
        )

    @cached_property
    def outside(self) -> list[int]:
        """Tensors of no layer."""
        return [t for t, key in enumerate(self.keys) if layer_of(key) is None]

    def kinds(self) -> dict[str, list[tuple[int, int]]]:
        """(layer, tensor) of each kind of tensor, by what follows the number in its name."""
        found: dict[str, list[tuple[int, int]]] = {}
        for i, layer in enumerate(self.layers):
            for t in layer.tensors:
                kind = self.keys[t].removeprefix(layer.name).lstrip(".") or "(layer)"
                found.setdefault(kind, []).append((i, t))
        return found

    def joint_norms(self, tensors: Sequence[int]) -> Array:
        """[n], norms over these tensors together; NaN for a model that has none of them."""
        chosen = list(tensors)
        squares = np.where(self.present[chosen], self.norms[chosen] ** 2, 0).sum(0)
        return np.where(self.present[chosen].any(0), np.sqrt(squares), np.nan)

    def cosines(self, tensors: Sequence[int]) -> Array:
        """[n, n], over these tensors together: of those that both have; NaN where there is none."""
        chosen = list(tensors)
        both = self.present[chosen, :, None] & self.present[chosen, None, :]
        squares = np.diagonal(self.dots[chosen], axis1=1, axis2=2)
        own = np.where(both, squares[:, :, None], 0).sum(0)
        return _ratio(self.dots[chosen].sum(0), np.sqrt(own * own.T))


def _ratio(a: Array, b: Array) -> Array:
    """a / b, NaN where b is 0."""
    return a / np.where(b == 0, np.nan, b)


def summarise(rows: Mapping[str, Row], models: Sequence[str]) -> Summary:
    """The rows of `numbers`, added up by tensor, of a merge of these models."""
    t, n = len(rows), len(models)
    name = "models" if any("models" in row for row in rows.values()) else "task_vectors"
    elements, dots = np.zeros((t, n)), np.zeros((t, n, n))
    for i, row in enumerate(rows.values()):
        some = len(row["elements"])
        elements[i, :some] = row["elements"]
        dots[i, :some, :some] = np.reshape(row[name], (some, some))
    conflicts = _columns(rows, "conflicts", 1)
    return Summary(
        keys=tuple(rows),
        models=tuple(models),
        compared=name.replace("_", " "),
        elements=elements,
        dots=dots,
        merged=np.sqrt([row["merged"][0] for row in rows.values()]),
        conflicts=None if conflicts is None else conflicts[:, 0],
        kept=_columns(rows, "kept", n),
    )


def _columns(rows: Mapping[str, Row], name: str, width: int) -> Array | None:
    """[T, width], NaN where a tensor has no such numbers; None if no tensor has any."""
    if not any(name in row for row in rows.values()):
        return None
    found = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows.values()):
        if name in row:
            found[i] = [*row[name], *[0.0] * (width - len(row[name]))]
    return found
