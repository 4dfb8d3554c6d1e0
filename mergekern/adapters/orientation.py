"""Which linear layers of a checkpoint hold [in, out], as Conv1D of transformers does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..methods.compat import Signature


class Orientation:
    """Whether a layer holds [in, out] and not [out, in].

    PEFT tells by the layer's type; what it saves as fan_in_fan_out is that of the last layer alone.
    In a checkpoint the length of a bias tells: that of the nearest other layers (in the smallest
    part of the model that has any that are not square), and where there are none the setting.
    """

    def __init__(self, base: Mapping[str, Signature], setting: bool) -> None:
        self._base, self._setting = base, setting
        self._seen: dict[str, list[bool]] = {}  # of each part of the model, its layers
        for key in base:
            turned = self._own(key)
            if turned is not None:
                for part in self._parts(key):
                    self._seen.setdefault(part, []).append(turned)

    def of(self, key: str, shape: tuple[int, ...]) -> bool | None:
        """Of the layer that holds `key`, whose task vector is [out, in]; None if unknown."""
        if self._base[key].shape != shape[::-1]:
            return False
        near = self._near(key)
        if shape != shape[::-1]:
            return self._setting or near == {True}
        if not near:
            return self._setting
        if len(near) == 2:
            return None
        # Conv1D always has a bias: a square layer without one is of another kind.
        return near == {True} and self._bias(key) is not None

    def _near(self, key: str) -> set[bool]:
        own = self._own(key)
        for part in self._parts(key):
            others = list(self._seen.get(part, ()))
            if own is not None and others:
                others.remove(own)
            if others:
                return set(others)
        return set()

    def _own(self, key: str) -> bool | None:
        """By its own bias; None if square, or without one."""
        shape, bias = self._base[key].shape, self._bias(key)
        if len(shape) != 2 or shape[0] == shape[1] or bias is None or len(bias) != 1:
            return None
        return bias[0] == shape[1] if bias[0] in shape else None

    def _bias(self, key: str) -> tuple[int, ...] | None:
        name = f"{key.removesuffix('weight')}bias"
        return self._base[name].shape if key.endswith("weight") and name in self._base else None

    @staticmethod
    def _parts(key: str) -> Iterator[str]:
        """Of "h.0.attn.c_proj.weight": "h.0.attn", "h.0", "h", ""."""
        part = key.rpartition(".")[0]
        while part:
            part = part.rpartition(".")[0]
            yield part
