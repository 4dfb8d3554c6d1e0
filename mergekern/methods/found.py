"""What a survey or a measure found as plain data, and back without loss: JSON can hold it.

Numbers that are not whole are written by float.hex, tensors as the bytes of their elements.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError
from ..keep import Band, Threshold
from .sce import Chosen
from .trims import Kept
from .whole_model import Found

_RECORDS = {kind.__name__: kind for kind in (Band, Chosen, Found, Kept, Threshold)}


def dump(found: Any) -> Any:
    """None, texts, booleans, whole numbers and lists as they are, the rest as {kind: content}.

    Takes also floats, tuples, dicts, float64 tensors and the records of the methods.
    Raises: ArgumentError for anything else.

    >>> dump((0.1, {("w", 0): Threshold(1.0, 2, 3, 4)}))["tuple"][0]
    {'float': '0x1.999999999999ap-4'}
    """
    if found is None or isinstance(found, str | bool | int):
        return found
    if isinstance(found, float):
        return {"float": found.hex()}
    if isinstance(found, list):
        return [dump(v) for v in found]
    if isinstance(found, dict):
        return {"dict": [[dump(k), dump(v)] for k, v in found.items()]}
    if isinstance(found, Tensor) and found.dtype == torch.float64:
        data = found.cpu().contiguous().numpy().astype("<f8").tobytes()
        return {"float64": base64.b64encode(data).decode(), "shape": list(found.shape)}
    if isinstance(found, tuple):
        kind = type(found).__name__
        if _RECORDS.get(kind, tuple) is type(found):
            return {kind: [dump(v) for v in found]}
    got = type(found).__name__
    raise ArgumentError.of("dump", "holds what no method finds", got, "plain data and records")


def load(plain: Any) -> Any:
    """What `dump` was given.

    Raises: ArgumentError for what `dump` does not write.

    >>> load(dump({"w": (float("inf"), None)}))
    {'w': (inf, None)}
    """
    if plain is None or isinstance(plain, str | bool | int):
        return plain
    if isinstance(plain, list):
        return [load(v) for v in plain]
    kind = next(iter(plain), "") if isinstance(plain, dict) else ""
    if kind == "float":
        return float.fromhex(plain[kind])
    if kind == "dict":
        return {load(k): load(v) for k, v in plain[kind]}
    if kind == "float64":
        values = np.frombuffer(base64.b64decode(plain[kind]), "<f8").astype(np.float64)
        return torch.from_numpy(values).view(plain["shape"])
    if kind == "tuple":
        return tuple(load(v) for v in plain[kind])
    if kind in _RECORDS:
        return _RECORDS[kind](*(load(v) for v in plain[kind]))
    got = type(plain).__name__ if not kind else repr(kind)
    raise ArgumentError.of("load", "holds what dump does not write", got, "the result of dump")
