"""What goes into the output folder beside the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from .checkpoint import FOREIGN, IGNORED_FOLDERS, WEIGHTS, Checkpoint
from .config import MergeConfig

CONFIG_NAME = "mergekern_config.yml"


def carry(source: Checkpoint, target: Path) -> tuple[list[str], list[str]]:
    """Copies every file of the model that is no weight; returns names copied and left out.

    Left out: weights in any form (the merge replaces or outdates them), README.md (a new card is
    written) and caches.
    """
    copied: list[str] = []
    left_out: list[str] = []
    if source.folder is None:
        return copied, left_out
    for path in sorted(source.folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(source.folder)
        weights = path.suffix in (*WEIGHTS, *FOREIGN) or path.name.endswith(".index.json")
        foreign = bool(set(name.parts[:-1]) & set(IGNORED_FOLDERS))
        if weights or foreign or name == Path("README.md"):
            if path not in source.weight_files:
                left_out.append(name.as_posix())
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        copied.append(name.as_posix())
    return copied, left_out


def write_card(config: MergeConfig, target: Path) -> None:
    """README.md as a model card, and the configuration as the user wrote it."""
    (target / CONFIG_NAME).write_text(config.text, encoding="utf-8")
    base = f"base model: `{config.base}`\n" if config.base else ""
    models = "\n".join(f"- `{m.path}`" for m in config.models)
    card = f"""---
tags:
- merge
- mergekern
---
# Merged model

Made by mergekern with the method `{config.method.name}`: {config.method.doc}

{base}
{models}

## Configuration

```yaml
{config.text.strip()}
```
"""
    (target / "README.md").write_text(card, encoding="utf-8")
