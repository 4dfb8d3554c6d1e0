"""fold_adapter: a base with an adapter in its weights, by the stream that merges checkpoints."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.files import load_adapter
from ..adapters.targets import Change, Product, changes_of, require_untied
from ..check import name_of, parse_size
from ..errors import CheckpointError
from ..methods.registry import REQUIRED, Inputs, Method, Parameter
from .checkpoint import Checkpoint
from .collector import paused
from .config import MergeConfig
from .defaults import DEFAULT_MEMORY, DEFAULT_SHARD_SIZE
from .files.formats import bytes_of
from .job import Job, Options
from .journal import digest_of, joined
from .keys import AS_STORED
from .manifest import Manifest
from .model_entry import ModelEntry
from .progress import Bar, bar
from .run import check_device

METHOD = "fold"
_BLOCK = 1 << 15  # elements under way in float64: they stay in cache


def fold_adapter(
    adapter: str | PathLike[str] | Adapter,
    base: str | PathLike[str],
    out: str | PathLike[str],
    *,
    memory: int | str = DEFAULT_MEMORY,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    device: str = "cpu",
    resume: bool = True,
    progress: bool | Bar = True,
    made_by: Mapping[str, Any] | None = None,
) -> Manifest:
    """W + scale * B A for every weight that the adapter changes; all others as they are.

    Every tensor of the base is written to the folder `out`, under its name, in its shape and dtype.
    Convolutions and embeddings change in the shapes they have, weights that the base holds as
    [in, out] (Conv1D of transformers) transposed. Tensors that an adapter saves whole
    (modules_to_save, biases) take the place of the base's, biases of second factors are added to
    it.
    adapter: what `load_adapter` reads, or an `Adapter`. base: a model folder, file or `org/name` of
    the hub, as in `merge_checkpoints`; names must be those the adapter was trained on. For kohya's
    names see `adapters.targets`. made_by: what the output's configuration says of the adapter.
    Result: products and the sum with W in float64, one rounding to the base's dtype: an element is
    within half a unit in the last place of that dtype, and (r + 3) 2^-53 (|W| + |scale| |B| |A|),
    of the exact value. A whole tensor is rounded once. memory, resume, progress and the files
    beside the weights as in `merge_checkpoints`; the manifest has the digest of the adapter.
    Cost: reads and writes the base once; 2 r multiplications a changed element.
    Raises: ArgumentError that lists all parts that the base lacks, has in another shape or
    quantised, and for embeddings that the base ties to its output head; CheckpointError where a
    sum overflows the base's dtype, and as `merge_checkpoints`.
    Source: PEFT `merge_and_unload`, kohya's `merge_lora.py`.

    >>> fold_adapter("nowhere", "base", "out")
    Traceback (most recent call last):
    mergekern.errors.CheckpointError: nowhere: no readable adapter (no such file or folder)
    """
    check_device(device)
    options = Options(
        parse_size("memory", memory), parse_size("shard_size", shard_size), device, resume=resume
    )
    given = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    source = {"adapter": str(adapter)} if not isinstance(adapter, Adapter) else {}
    with paused():
        opened = Checkpoint(str(base))
        try:
            changes = changes_of(given, opened.signatures)
            if not given.config.get("ensure_weight_tying"):
                copied = given.config.get("modules_to_save") or ()
                require_untied(changes, copied, opened.signatures, _settings(opened.folder))
        finally:
            opened.close()
        config = _config(str(base), changes, {**source, **(made_by or {})})
        job = Job({"": config}, options, [opened.commit])
    with job, bar(shown=progress) as shown:
        return job.run(Path(out), shown)[0]


def _settings(folder: Path | None) -> dict[str, Any]:
    """config.json of transformers, if the base has one."""
    path = None if folder is None else folder / "config.json"
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: no readable settings ({error})") from None
    return found if isinstance(found, dict) else {}


def _config(base: str, changes: Mapping[str, Change], made_by: Mapping[str, Any]) -> MergeConfig:
    """A merge of one model, by a method that knows the changes."""
    digest = joined(_digest(key, changes[key]) for key in sorted(changes))
    about = {"merge_method": METHOD, "models": [{"model": base}], "digest": digest}
    return MergeConfig(
        method=_method(changes, digest),
        models=(ModelEntry(base),),
        base=None,
        parameters={"digest": digest},
        dtype=None,
        out_dtype=None,
        exceptions=(),
        only=tuple(map(glob.escape, changes)),
        skip=(),
        home=base,
        base_naming=AS_STORED,
        text=yaml.safe_dump({**about, **made_by}, sort_keys=False),
    )


def _digest(key: str, change: Change) -> str:
    whole = change.onto if isinstance(change, Product) else change
    parts = [] if whole is None else [whole]
    if isinstance(change, Product):
        parts += [change.left, change.right]
    scale = change.scale if isinstance(change, Product) else None
    each = [f"{name_of(x.dtype)} {digest_of(bytes_of(x.contiguous().view(-1)))}" for x in parts]
    return digest_of(f"{key} {scale} {each}")


def _method(changes: Mapping[str, Change], digest: str) -> Method:
    """It is in no registry: what it does is in `changes`, which the digest stands for in plans."""

    def merge(inputs: Inputs, digest: str) -> Tensor:
        change = changes[inputs.name]
        if isinstance(change, Product):
            return _added(inputs, change)
        return _rounded(_there(change, inputs), inputs).view(inputs.xs[0].shape)

    return Method(
        METHOD,
        "An adapter's task vectors added to a base, in float64, rounded once.",
        base="optional",
        models=(1, 1),
        parameters=(
            Parameter("digest", str, "tensor", REQUIRED, "of the changes", choices=(digest,)),
        ),
        merge=merge,
        cut=lambda arguments, shape, host: "rows",
    )


def _there(whole: Tensor | None, inputs: Inputs) -> Tensor:
    """What the adapter has in the place of these elements of the base, or these."""
    x = inputs.xs[0]
    if whole is None:
        return x
    return whole.reshape(-1)[inputs.offset : inputs.offset + x.numel()].to(x.device)


def _added(inputs: Inputs, change: Product) -> Tensor:
    """Of rows of the tensor: blocks of them, so that little is in float64 at a time."""
    x = inputs.xs[0]
    columns = change.right.shape[1]
    out = torch.empty(x.shape, dtype=inputs.out_dtype, device=x.device)
    rows, done = _there(change.onto, inputs).reshape(-1, columns), out.view(-1, columns)
    left, right = (f.to(x.device) for f in (change.left, change.right.double()))
    first, step = inputs.offset // columns, max(1, _BLOCK // columns)
    for begin in range(0, len(rows), step):
        end = min(begin + step, len(rows))
        of = left[first + begin : first + end].double()
        total = torch.addmm(rows[begin:end].double(), of, right, alpha=change.scale)
        done[begin:end] = _rounded(total, inputs)
    return out


def _rounded(exact: Tensor, inputs: Inputs) -> Tensor:
    """Raises: CheckpointError where finite numbers become infinite."""
    result = exact.to(inputs.xs[0].device, inputs.out_dtype)
    if not bool(result.isfinite().all()) and bool(exact.isfinite().all()):
        raise CheckpointError(
            f"{inputs.name}: with the adapter in it, it does not fit {name_of(inputs.out_dtype)}; "
            f"got {float(exact.abs().max()):.3g}; convert the base to a wider dtype first"
        )
    return result
