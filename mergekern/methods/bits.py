"""Masks of one bit per element, in the layout of numpy.packbits: in memory and in .npy files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import check
from ..bits import pack
from ..errors import ArgumentError, CheckpointError
from ..keep import Mask


class Packer:
    """Makes a Mask of booleans that come in pieces of any length."""

    def __init__(self, numel: int, device: torch.device) -> None:
        self._bits = torch.empty((numel + 7) // 8, dtype=torch.uint8, device=device)
        self._at = 0
        self._rest = torch.empty(0, dtype=torch.bool, device=device)

    def add(self, piece: Tensor) -> None:
        piece = torch.cat([self._rest, piece]) if len(self._rest) else piece
        whole = len(piece) // 8 * 8
        self._store(piece[:whole])
        self._rest = piece[whole:].clone()

    def _store(self, piece: Tensor) -> None:
        packed = pack(piece)
        self._bits[self._at : self._at + len(packed)] = packed
        self._at += len(packed)

    def mask(self) -> Mask:
        """The mask, its last byte filled with zeros."""
        if len(self._rest):
            self.add(torch.zeros(8 - len(self._rest), dtype=torch.bool, device=self._rest.device))
        return Mask(self._bits)


def save_masks(path: str | Path, masks: Mapping[str, Mask], like: Mapping[str, Tensor]) -> None:
    """Writes np.packbits of the flat masks of all names, in sorted order, as one .npy file.

    Shapes: masks[name] has one bit per element of like[name]; the names of both are the same.
    Result: a one-dimensional uint8 array of ceil(sum of elements / 8) bytes: tensors follow each
    other bit by bit, not byte by byte. One file holds the masks of one model.
    Raises: ArgumentError for other names or sizes.
    Source: tall_masks `state_dict_to_vector` and np.packbits.

    >>> import tempfile, torch
    >>> masks = {"b": Mask(torch.tensor([160], dtype=torch.uint8))}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_masks(f"{folder}/m.npy", masks, {"b": torch.zeros(3)})
    ...     load_masks(f"{folder}/m.npy", {"b": torch.zeros(3)})["b"].bits.tolist()
    [160]
    """
    if set(masks) != set(like):
        odd = ", ".join(sorted(set(masks) ^ set(like)))
        raise ArgumentError.of(
            "save_masks", "names differ", odd, "masks and like of the same names"
        )
    vector = np.zeros((sum(x.numel() for x in like.values()) + 7) // 8, np.uint8)
    at = 0
    for name in sorted(like):
        n = like[name].numel()
        check.mask("save_masks", masks[name].bits, n, masks[name].bits.device)
        bits = _ended(masks[name].bits.cpu().numpy().copy(), n)
        start, shift = divmod(at, 8)
        vector[start : start + len(bits)] |= bits >> shift
        if shift:
            spilled = bits << (8 - shift)
            tail = vector[start + 1 : start + 1 + len(bits)]
            tail |= spilled[: len(tail)]
        at += n
    with open(path, "wb") as file:
        np.save(file, vector)


def load_masks(
    source: str | os.PathLike | np.ndarray, like: Mapping[str, Tensor]
) -> dict[str, Mask]:
    """The masks of one model from a .npy file of `save_masks`, or from the array in it.

    Shapes: `like` has exactly the tensors of the packed vector; each mask lies on its device.
    tall_masks itself pickles a dict of such arrays, one per model. Pickles are not read, as they
    may run code: if you trust the file, pass np.load(path, allow_pickle=True).item()[model].
    Raises: CheckpointError where the file is no array of bytes, or has another length.
    Source: tall_masks `load_tall_mask`.

    >>> import torch
    >>> like = {"a": torch.zeros(2), "b": torch.zeros(3)}
    >>> {k: m.bits.tolist() for k, m in load_masks(np.array([0b10101000], np.uint8), like).items()}
    {'a': [128], 'b': [160]}
    """
    if isinstance(source, np.ndarray):
        vector, where = source, "the array"
    else:
        vector, where = _read(source), str(source)
    total = sum(x.numel() for x in like.values())
    got = f"{vector.dtype} {list(vector.shape)}"
    expected = f"uint8 [{(total + 7) // 8}]"
    if got != expected:
        raise CheckpointError(
            f"load_masks: {where} does not fit the models; got {got}; expected {expected}"
        )
    masks, at = {}, 0
    for name in sorted(like):
        n = like[name].numel()
        length = (n + 7) // 8
        start, shift = divmod(at, 8)
        bits = vector[start : start + length] << shift
        if shift:
            following = vector[start + 1 : start + 1 + length]
            bits[: len(following)] |= following >> (8 - shift)
        masks[name] = Mask(torch.from_numpy(_ended(bits, n)).to(like[name].device))
        at += n
    return {name: masks[name] for name in like}


def _ended(bits: np.ndarray, n: int) -> np.ndarray:
    """`bits` with zeros after the first n."""
    if n % 8:
        bits[-1] &= 0xFF << (8 - n % 8) & 0xFF
    return bits


def _read(path: str | os.PathLike) -> np.ndarray:
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CheckpointError(
            f"load_masks: {path} is no .npy file of bytes; got {error}; expected what save_masks "
            "writes (of a pickled dict, pass np.load(path, allow_pickle=True).item()[model])"
        ) from None
    if not isinstance(found, np.ndarray):
        raise CheckpointError(f"load_masks: {path} is no .npy file; got an archive; expected .npy")
    return found
