"""Models of the Hugging Face hub by name, downloaded once into its cache and pinned to a commit."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError

_NAME = re.compile(r"([a-zA-Z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
# Weights in forms that are not read, and what other runtimes need. All else may be carried along.
_NOT_WANTED = [
    *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ggml", "*.tflite", "*.ot", "*.pb"),
    *("*.pt", "*.pth", "*.ckpt", "*.pkl"),
    *(f"{at}{name}/*" for name in ("onnx", "openvino", "coreml") for at in ("", "*/")),
]
# At the root only (a pattern begins there): a subfolder may have no other weights.
_PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin"]
# What a download raises, beside OSError and ValueError; no version of the library has all of them.
_FAILURES = ("HTTPError", "EntryNotFoundError", "RevisionResolutionError", "XetDownloadError")


def local(model: str, commit: str | None = None) -> tuple[Path, str | None]:
    """Where a model is on this disk; and its commit, if it is `org/name[@revision]` of the hub.

    A file or folder of that name goes first. commit: instead of the revision, to have the very
    files again. Pickles of the whole model are only downloaded where it has no safetensors.

    Raises: CheckpointError with what to do, where it cannot be downloaded.
    """
    found = None if os.path.exists(model) else _NAME.fullmatch(model)
    if found is None:
        return Path(model), None
    repository, revision = found.groups()
    folder = _download(model, repository, commit or revision, [*_NOT_WANTED, *_PICKLES])
    if not any(folder.glob("*.safetensors")):
        folder = _download(model, repository, folder.name, _NOT_WANTED)
    return folder, folder.name


def _download(model: str, repository: str, revision: str | None, without: list[str]) -> Path:
    """The folder of a snapshot, which is called after its commit."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{model}: no such file or folder; to download it from the hub, "
            "pip install 'mergekern[hub]'"
        ) from None
    failures = tuple(getattr(errors, name) for name in _FAILURES if hasattr(errors, name))
    try:
        return Path(snapshot_download(repository, revision=revision, ignore_patterns=without))
    except (OSError, ValueError, *failures) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise CheckpointError(
            f"{model}: no such file or folder, and the hub does not give it "
            f"({type(error).__name__}: {reason}); check the name, the network, HF_HUB_OFFLINE and "
            "the login of a gated model, or give the path of a copy"
        ) from None
