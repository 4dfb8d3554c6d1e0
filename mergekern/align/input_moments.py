"""Second moments of what goes into linear layers: one for all layers that read one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..methods.regmean import UNIT
from ..ops.covariance import Covariance

_OP = "regmean"
Layers = Mapping[str, Sequence[nn.Linear]]  # name of a weight -> the layers that hold it


class _Seen(NamedTuple):
    """A tensor, the state it was in, its moments and who has read it so."""

    x: Tensor
    version: int | None  # unknown of tensors made in inference mode
    moments: Covariance
    readers: list[str]


class InputMoments:
    """By the names of the weights that read the same tensors, the moments of these.

    Layers that read one tensor are called one after another (queries, keys and values; gates), so
    only the last tensor is remembered. It is read at once: what is changed in place later is
    another tensor. Who reads a tensor twice is named twice.
    """

    def __init__(self, label: str, nan: str, backend: str) -> None:
        self.unit = 0.0  # of the least exact input
        self._label, self._nan, self._backend = label, nan, backend
        self._found: dict[tuple[str, ...], Covariance] = {}
        self._last: _Seen | None = None

    @contextmanager
    def watching(self, layers: Layers) -> Iterator[None]:
        """Calls of these layers in the block are read."""
        hooks = [
            layer.register_forward_pre_hook(partial(self._read, name), with_kwargs=True)
            for name, holders in layers.items()
            for layer in holders
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._keep()

    @torch.inference_mode(False)  # sums are added to outside of a model's own inference mode
    @torch.no_grad()
    def _read(self, name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        x, last = args[0] if args else kwargs["input"], self._last
        if not x.shape[:-1].numel():
            return  # of no rows there are no moments
        version = None if x.is_inference() else x._version
        if last and x is last.x and version is not None and version == last.version:
            last.readers.append(name)
            return
        self._keep()
        moments = self._empty(x.shape[-1], x.device)
        try:
            moments.update(x)
        except ArgumentError as error:
            what = f"what goes into {name} of {self._label} cannot be read"
            raise ArgumentError.of(_OP, what, str(error).partition(";")[0], "numbers") from None
        self.unit = max(self.unit, UNIT.get(x.dtype, 2.0**-24))
        self._last = _Seen(x, version, moments, [name])

    def _empty(self, size: int, device: torch.device) -> Covariance:
        return Covariance(size, device=device, nan=self._nan, backend=self._backend)

    def _keep(self) -> None:
        if self._last is not None:
            names = tuple(self._last.readers)
            if names in self._found:
                self._found[names].merge(self._last.moments)
            else:
                self._found[names] = self._last.moments
            self._last = None

    def groups(self) -> Iterator[tuple[tuple[str, ...], Covariance]]:
        """Every weight that has read something, once, with all that it has read."""
        keys: dict[str, list[tuple[str, ...]]] = {}
        for names in self._found:
            for name in names:
                keys.setdefault(name, []).append(names)
        for names, moments in self._found.items():
            if all(len(keys[name]) == 1 for name in names):
                yield names, moments
        for name, several in keys.items():
            if any(len(keys[other]) > 1 for names in several for other in names):
                yield (name,), self._together(several)

    def _together(self, several: Sequence[tuple[str, ...]]) -> Covariance:
        first = self._found[several[0]]
        total = self._empty(len(first.mean), first.mean.device)
        for names in several:
            total.merge(self._found[names])
        return total
