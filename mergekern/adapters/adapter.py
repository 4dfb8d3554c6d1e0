"""An adapter: for each module a product of two small factors, and tensors saved whole."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The task vector scale * b @ a of one weight.

    a [r, in], b [out, r]; of a convolution the columns of a are the weight's axes behind the first,
    flattened, and `shape` holds them. scale * bias, if there is one, changes the module's bias.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    shape: tuple[int, ...] = ()
    embedding: bool = False  # the weight is [in, out]: its change is the product's transpose
    bias: Tensor | None = None  # [out]

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def alpha(self) -> float:
        """scale * r: what files hold in place of the scale. Of numbers that round to one scale, one
        that float32 holds, if there is one."""
        exact = self.scale * self.rank
        short = float(torch.tensor(exact, dtype=torch.float32))
        return short if short / self.rank == self.scale else exact

    def delta(self) -> Tensor:
        """The change of the weight, in float64."""
        product = self.scale * (self.b.double() @ self.a.double())
        return product.T if self.embedding else product.view(len(self.b), *self.shape)


@dataclass
class Adapter:
    """modules: factors by module name. saved: whole tensors (of modules_to_save, biases) by tensor
    name. config: the adapter's settings but for ranks and scales. lost: module -> the share
    |rest|_F / |task vector|_F that a truncation left out. layout: of files, which name modules each
    in their own way: "peft", "kohya" or "diffusers"."""

    modules: dict[str, Factors]
    saved: dict[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    layout: str = "peft"

    def dtype(self) -> torch.dtype:
        """That of the factors; of several the one that holds them all."""
        kinds = (t.dtype for f in self.modules.values() for t in (f.a, f.b))
        return functools.reduce(torch.promote_types, kinds)
