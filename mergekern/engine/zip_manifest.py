"""What a zip says of itself: how it was made, from what, and how well each space was matched."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..align.matching.match import Match
from ..align.merging.partial import PartialZip
from ..version import __version__


@dataclass(frozen=True)
class Fitted:
    """A space that moves, and how well it was matched (`Fit`), where activations were read.

    merged: whether it is in the result, or in the trunk of a partial one, rather than in the heads.
    """

    size: int
    heads: int
    merged: bool
    approximate: str | None
    before: float | None
    after: float | None
    merged_within: float | None


@dataclass(frozen=True)
class ZipManifest:
    """What a zip did. seconds: of each step. left_out: arrays, and files of the first model's
    folder, that were not used or carried along."""

    out: Path
    method: str
    until: str | None
    models: int
    samples: int
    spaces: Mapping[str, Fitted]
    seconds: Mapping[str, float]
    left_out: tuple[str, ...]

    def about(
        self, arguments: Mapping[str, Any], read: Iterable[Path], data: Iterable[Path]
    ) -> dict[str, Any]:
        """With versions, arguments, and the SHA-256 of files; one for all of `data`."""
        each = [_sha256(path) for path in data]
        together = hashlib.sha256("".join(each).encode()).hexdigest()
        return {
            "versions": {
                "mergekern": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "arguments": arguments,
            "sha256": {str(path): _sha256(path) for path in read},
            "data": {"files": len(each), "sha256 of their sha256": together},
            **asdict(self),
        }


def fitted(found: Match, merged: nn.Module) -> dict[str, Fitted]:
    """All spaces that move, in the order of the model."""
    each = {}
    for name, space in found.spaces.movable.items():
        made = {p.name for p in space.places if p.role in ("produces", "both")}
        inside = not isinstance(merged, PartialZip) or not made.isdisjoint(_trunk(found, merged))
        fit = found.correlations.get(name)
        numbers = [None if x is None or math.isnan(x) else x for x in fit or (None, None, None)]
        each[name] = Fitted(space.size, space.heads, inside, space.approximate, *numbers)
    return each


def _trunk(found: Match, merged: PartialZip) -> set[str]:
    """Tensors of the trunk, by all of their names."""
    aliases = found.spaces.program.architecture.aliases
    return {x for name in merged.parts.trunk.names.values() for x in aliases.get(name, ())}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
