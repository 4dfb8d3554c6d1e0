"""Statistics: how the features of several models move together, over the same inputs."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ... import check
from ...errors import ArgumentError
from ...ops.covariance import Covariance
from ..models import require, spaces_fingerprint
from ..spaces import Space, Spaces

_FORMAT = "mergekern statistics 2"  # the one key of the metadata, so that bytes are the same


class Moments(NamedTuple):
    """Of every channel of an output: rows seen, mean and biased variance, float64."""

    rows: int
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """What `collect_statistics` saw of some models.

    fingerprints: of the models, in their order. covariances: of the features of all models of a
    space, those of model 0 first; without `within`, of model 0 with those of all others.
    outputs: node of the traced model -> the moments of what it returns, for each model, of the
    layers that REPAIR scales.
    """

    spaces: Spaces
    fingerprints: tuple[str, ...]
    within: bool
    covariances: Mapping[str, Covariance]
    outputs: Mapping[str, list[Moments]]

    @property
    def models(self) -> int:
        """How many were seen."""
        return len(self.fingerprints)

    def correlation(self, space: str, eps: float = 0.0) -> Tensor:
        """float64 [N size, N size], or [size, (N - 1) size] without `within`.

        Numbers, eps and what a feature of variance 0 has, as in `mergekern.correlation`.
        """
        return self._covariance(space).correlation(eps)

    def between(self, correlation: Tensor, model: int) -> Tensor:
        """Of a result of `correlation`, the block of model 0 (rows) with `model` (columns)."""
        size = len(correlation) // self.models if self.within else len(correlation)
        start = (model if self.within else model - 1) * size
        return correlation[:size, start : start + size]

    def count(self, space: str) -> int:
        """The rows that were seen of it."""
        return self._covariance(space).count

    def dead(self, space: str) -> list[int]:
        """Of each model, how many features never change: these correlate with none."""
        found = self._covariance(space)
        variances = [found.variance_x] if self.within else [found.variance_x, found.variance_y]
        each = torch.cat(variances).view(self.models, -1)
        return (each == 0).sum(1).tolist()

    def _covariance(self, space: str) -> Covariance:
        check.choice("statistics", "space", space, list(self.covariances))
        return self.covariances[space]

    def require(self, op: str, models: Sequence[nn.Module]) -> None:
        """Raises ArgumentError unless these are the models that were seen, in their order."""
        require(op, models, self.fingerprints)

    def save(self, path: str | PathLike[str]) -> None:
        """As safetensors: the accumulators, and fingerprints of the models and of the spaces.

        All accumulators are in memory at that point.
        """
        tensors = _state_of(self.covariances)
        for node, each in self.outputs.items():
            for i, (rows, mean, variance) in enumerate(each):
                named = {"rows": torch.tensor(rows), "mean": mean, "variance": variance}
                tensors |= {f"{node}/{i}/{name}": x.contiguous() for name, x in named.items()}
        about = {
            "models": self.fingerprints,
            "spaces": spaces_fingerprint(self.spaces),
            "within": self.within,
            "outputs": list(self.outputs),
        }
        save_file(tensors, path, metadata={_FORMAT: json.dumps(about)})

    @classmethod
    def load(
        cls, path: str | PathLike[str], spaces: Spaces, models: Sequence[nn.Module] | None = None
    ) -> Statistics:
        """What `save` wrote, on the CPU; accumulators are read from the file as they are needed.

        Raises: ArgumentError for another file, and for statistics of other spaces or models than
        those given.
        """
        op = "Statistics.load"
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if _FORMAT not in found:
                got = f"{path} with {', '.join(found) or 'no metadata'}"
                raise ArgumentError.of(op, "file holds no statistics", got, repr(_FORMAT))
            about = json.loads(found[_FORMAT])
            if about["spaces"] != spaces_fingerprint(spaces):
                got = f"spaces {about['spaces'][:12]}"
                expected = f"{spaces_fingerprint(spaces)[:12]}, those given"
                raise ArgumentError.of(op, "statistics are of other spaces", got, expected)
            fingerprints, within = about["models"], about["within"]
            if models is not None:
                require(op, models, fingerprints)
            outputs = {}
            for node in about["outputs"]:
                outputs[node] = [
                    Moments(
                        int(file.get_tensor(f"{node}/{i}/rows")),
                        file.get_tensor(f"{node}/{i}/mean"),
                        file.get_tensor(f"{node}/{i}/variance"),
                    )
                    for i in range(len(fingerprints))
                ]
        covariances = Stored(spaces, len(fingerprints), within, dict.fromkeys(spaces.movable, path))
        return cls(spaces, tuple(fingerprints), within, covariances, outputs)


class Stored(Mapping[str, Covariance]):
    """Accumulators that lie in files, each read when it is asked for, onto the CPU."""

    def __init__(
        self,
        spaces: Spaces,
        models: int,
        within: bool,
        files: Mapping[str, str | PathLike[str]] | None = None,
    ) -> None:
        self._spaces, self._models, self._within = spaces, models, within
        self._files = dict(files or {})

    def put(self, covariances: Mapping[str, Covariance]) -> None:
        """Writes them into a temporary folder, which goes with this object."""
        folder = tempfile.mkdtemp(prefix="mergekern-statistics-")
        weakref.finalize(self, shutil.rmtree, folder)
        path = Path(folder) / "accumulators.safetensors"
        save_file(_state_of(covariances), path)
        self._files |= dict.fromkeys(covariances, path)

    def __getitem__(self, name: str) -> Covariance:
        found = accumulator(self._spaces[name], self._models, self._within)
        with safe_open(self._files[name], framework="pt") as file:
            found.load_state_dict({k: file.get_tensor(f"{name}/{k}") for k in found.state_dict()})
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _state_of(covariances: Mapping[str, Covariance]) -> dict[str, Tensor]:
    """As `Stored` reads them."""
    return {
        f"{space}/{name}": x.contiguous()
        for space, found in covariances.items()
        for name, x in found.state_dict().items()
    }


def accumulator(space: Space, models: int, within: bool, **options: Any) -> Covariance:
    """For the features of a space in all models; `options` of `Covariance`."""
    if within:
        return Covariance(models * space.size, **options)
    return Covariance(space.size, (models - 1) * space.size, **options)
