"""load_adapter and save_adapter: the layouts of adapters on disk, told apart by their names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .. import check
from ..errors import ArgumentError, CheckpointError
from . import diffusers_file, kohya_file, peft_folder, tensors
from .adapter import Adapter
from .tensors import Content

_WRITE: dict[str, Callable[[Adapter, Path], None]] = {
    "peft": peft_folder.write,
    "kohya": kohya_file.write,
    "diffusers": diffusers_file.write,
}
_READ: dict[str, Callable[[Path, Content], Adapter]] = {
    "kohya": kohya_file.read,
    "diffusers": diffusers_file.read,
}


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """An adapter as PEFT, kohya's scripts or diffusers wrote it; `layout` says who.

    path: a folder with adapter_config.json (PEFT) or pytorch_lora_weights.safetensors (diffusers),
    or one .safetensors file of kohya or diffusers, told apart by the names in it.
    Result: dtypes stay; nothing is computed. Names of modules are those in the file: kohya's have
    underscores for dots, which only a base can tell apart from others (`fold_adapter`).
    Raises: CheckpointError for files that are missing or unreadable or of mixed layouts, factors
    without their partner or of other ranks than the settings say, dtypes that are not floating
    (quantised weights), NaN and infinities, and kinds of adapters that are more than two factors
    (DoRA, LoHa, LoKr, LoCon with a factor between). No tensor is passed over.
    Source: PEFT 0.21 `save_pretrained`, kohya's sd-scripts `networks/lora.py`, diffusers
    `save_lora_weights`.

    >>> load_adapter("nowhere")
    Traceback (most recent call last):
    mergekern.errors.CheckpointError: nowhere: no readable adapter (no such file or folder)
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no readable adapter (no such file or folder)")
    if path.is_dir():
        if not (path / diffusers_file.NAME).is_file():
            return peft_folder.read(path)
        if (path / peft_folder.CONFIG).exists():
            raise CheckpointError(
                f"{path}: two adapters; got {peft_folder.CONFIG} and {diffusers_file.NAME}; "
                "expected one of them"
            )
        path = path / diffusers_file.NAME
    content = tensors.read(path)
    return _READ[_layout(path, content)](path, content)


def _layout(path: Path, content: Content) -> str:
    """By the names of the factors; all of them must agree."""
    found: dict[str, str] = {}
    for name in content.tensors:
        if name.startswith(peft_folder.PREFIX):
            found["peft"] = name
        elif name.endswith((kohya_file.DOWN, kohya_file.UP)) or kohya_file.kind_of(name):
            found["kohya"] = name
        elif name.endswith(diffusers_file.ENDS):
            found["diffusers"] = name
    if len(found) > 1:
        each = ", ".join(f"{name} ({layout})" for layout, name in sorted(found.items()))
        raise CheckpointError(f"{path}: names of several layouts; got {each}; expected one layout")
    if not found:
        raise CheckpointError(
            f"{path}: no readable adapter; got {tensors.listed(content.tensors) or 'no tensors'}; "
            f"expected names that end in .{kohya_file.DOWN} or .lora_A.weight"
        )
    (layout,) = found
    if layout == "peft":
        raise CheckpointError(
            f"{path}: the weights of a PEFT adapter without their settings; got a file; expected "
            f"the folder, with {peft_folder.CONFIG}"
        )
    return layout


def save_adapter(
    adapter: Adapter, path: str | os.PathLike[str], *, layout: str | None = None
) -> None:
    """Writes what the tools of that layout load: a folder of PEFT, a file of kohya or diffusers.

    layout: "peft", "kohya" or "diffusers"; None for the adapter's own. No name is translated: a
    layout that calls modules otherwise is refused. Factors stay to the bit; scales are written as
    alpha, which gives them back exactly, or to the last place of float64 where no number does.
    Settings and metadata that the adapter was loaded with stay. Complete, or not there.
    Raises: ArgumentError for what the layout has no place for.

    >>> import tempfile, torch
    >>> from mergekern.adapters.adapter import Factors
    >>> one = Adapter({"fc": Factors(torch.ones(2, 3), torch.ones(4, 2), 0.5, shape=(3,))})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(one, folder)
    ...     load_adapter(folder).modules["fc"].scale
    0.5
    """
    layout = adapter.layout if layout is None else layout
    check.choice("save_adapter", "layout", layout, tuple(_WRITE))
    if layout != adapter.layout:
        raise ArgumentError.of(
            "save_adapter",
            f"modules are named as {adapter.layout} names them",
            f"layout={layout!r}",
            f"layout={adapter.layout!r}, or an Adapter with the names and the layout set anew",
        )
    _WRITE[layout](adapter, Path(path))
