"""The output folder: there when it is complete, with what goes into it beside the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ..check import name_of
from .checkpoint import FOREIGN, WEIGHTS, Checkpoint, folders
from .manifest import MANIFEST

CONFIG_NAME = "mergekern_config.yml"
CARD = "README.md"


def carry(
    source: Checkpoint, target: Path, dtype: torch.dtype | None
) -> tuple[list[str], list[str]]:
    """Copies every file of the model that is no weight; returns names copied and left out.

    Left out: weights in any form (the merge replaces or outdates them), README.md and an older
    manifest (new ones are written), folders of other runtimes and hidden ones. config.json gets
    the dtype of the result.
    """
    copied: list[str] = []
    left_out: list[str] = []
    if source.folder is None:
        return copied, left_out
    walked = folders(source.folder)
    for folder in walked:
        for path in sorted(folder.iterdir()):
            name = path.relative_to(source.folder)
            if path.is_dir():
                if path not in walked:
                    left_out.append(f"{name.as_posix()}/")
                continue
            weights = path.suffix in (*WEIGHTS, *FOREIGN) or path.name.endswith(".index.json")
            if weights or name in (Path(CARD), Path(MANIFEST)):
                if path not in source.weight_files:
                    left_out.append(name.as_posix())
                continue
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
            copied.append(name.as_posix())
    if dtype is not None:
        _set_dtype(target / "config.json", name_of(dtype))
    return copied, left_out


def _set_dtype(config: Path, name: str) -> None:
    """transformers loads a model in the dtype its config.json names, under either key."""
    if not config.is_file():
        return
    data = json.loads(config.read_text(encoding="utf-8"))
    stale = [k for k in ("dtype", "torch_dtype") if isinstance(data.get(k), str)]
    if any(data[k] != name for k in stale):
        data.update(dict.fromkeys(stale, name))
        config.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
