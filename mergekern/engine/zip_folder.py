"""The folder of a zip: weights, labels of features, a manifest; and the network that they make."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..align.discover import discover_spaces
from ..align.matching.match import Match
from ..align.merging.apply import apply
from ..check import name_of
from ..errors import ArgumentError, CheckpointError
from ..methods.compat import Signature, agree
from .files import SafetensorsFile, SafetensorsWriter

MANIFEST, WEIGHTS, LABELS = "zip.json", "model.safetensors", "labels.safetensors"
_OP = "load_zip"


def write_zip(folder: Path, model: nn.Module, match: Match, about: Mapping[str, Any]) -> None:
    """All tensors of a merged model, tied ones under each name; labels as "space/model"."""
    _write(folder / WEIGHTS, {name: x.detach() for name, x in model.state_dict().items()})
    labels = {f"{s}/{i}": x for s, each in match.labels.items() for i, x in enumerate(each)}
    _write(folder / LABELS, labels)
    text = json.dumps(about, indent=2, allow_nan=False, default=str)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    signatures = {name: Signature.of(x) for name, x in tensors.items()}
    writer = SafetensorsWriter(path, signatures, {"format": "pt"})
    for name, x in tensors.items():
        writer.write(name, x.cpu())


def _read(path: Path) -> dict[str, Tensor]:
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.signatures}


def describe_inputs(batch: Any) -> dict[str, dict[str, Any]]:
    """Name ("" for one without) -> dtype and shape of a sample; without the samples themselves."""
    named = {"": batch} if isinstance(batch, Tensor) else batch
    return {
        name: {"dtype": name_of(x.dtype), "shape": list(x.shape[1:])} for name, x in named.items()
    }


def _example(inputs: Mapping[str, Any], device: torch.device) -> Any:
    """Inputs of zeros, which serve to trace a model."""
    made = {
        name: torch.zeros(2, *x["shape"], dtype=getattr(torch, x["dtype"]), device=device)
        for name, x in inputs.items()
    }
    return made.get("", made)


def load_zip(folder: str | PathLike[str], model: nn.Module) -> nn.Module:
    """The network that `mergekern zip` wrote: `model` merged, or a `PartialZip` with its heads.

    model: any model of the architecture, such as a new one; it stays as it is.
    Result: a new module in eval mode, on the device and in the dtype of `model`.
    Cost: reads the weights; for a partial zip, a trace of `model` as in `discover_spaces`.
    Raises: CheckpointError for a folder that holds no zip, ArgumentError for a model of another
    architecture.

    >>> load_zip("merged", torch.nn.Linear(1, 1))
    Traceback (most recent call last):
    mergekern.errors.CheckpointError: merged: holds no zip (looked for zip.json)
    """
    root = Path(folder)
    if not (root / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: holds no zip (looked for {MANIFEST})")
    about = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    if about["until"] is None:
        made = copy.deepcopy(model)
    else:
        made = _partial(model, about, _read(root / LABELS))
    state = _read(root / WEIGHTS)
    wrong = agree(
        {
            "the model": {name: Signature.of(x) for name, x in made.state_dict().items()},
            str(folder): {name: Signature.of(x) for name, x in state.items()},
        }
    )
    if wrong:
        name, what = next(iter(wrong.items()))
        got = f"{len(wrong)} tensors that do not fit, {name} {what}"
        raise ArgumentError.of(_OP, "model is of another architecture", got, "the one zipped")
    made.load_state_dict(state)
    return made.eval()


def _partial(model: nn.Module, about: Mapping[str, Any], labels: dict[str, Tensor]) -> nn.Module:
    """With tensors of `model` in trunk and heads."""
    inputs = _example(about["inputs"], next(model.parameters()).device)
    spaces = discover_spaces(model, inputs, outputs=about["outputs"])
    n = about["models"]
    names = {f"{name}/{i}" for name in spaces.movable for i in range(n)}
    if names != set(labels):
        odd = ", ".join(sorted(names ^ set(labels))[:3])
        what = "model has other spaces than the one zipped"
        raise ArgumentError.of(_OP, what, odd, "the same architecture and torch")
    each = {name: [labels[f"{name}/{i}"] for i in range(n)] for name in spaces.movable}
    return apply([model] * n, Match(spaces, each, about["method"]), until=about["until"])
