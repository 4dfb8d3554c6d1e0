"""card: README.md of an output, as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ...check import FLOATS, name_of
from ...methods import REGISTRY
from ...methods.merge import method_named
from ...methods.registry import Method
from ..journal import joined

_FLOATS = tuple(map(name_of, FLOATS))
_ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
# What tells the library that loads a folder, by its name on the hub; the first one that is there.
_MARKS = (
    ("modules.json", "sentence-transformers"),
    ("open_clip_config.json", "open_clip"),
    ("model_index.json", "diffusers"),
)


def library_of(folder: Path) -> str | None:
    """The library that loads the model in `folder`, as the hub calls it; None if unknown.

    transformers writes its version into config.json, timm the settings it was pretrained with.
    """
    for name, library in _MARKS:
        if (folder / name).is_file():
            return library
    config = folder / "config.json"
    about = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    if not isinstance(about, dict):
        return None
    if "pretrained_cfg" in about:
        return "timm"
    return "transformers" if {"transformers_version", "model_type"} & set(about) else None


def card(
    manifest: Mapping[str, Any],
    *,
    library: str | None = None,
    report: str | None = None,
    method: Method | None = None,
) -> str:
    """A model card of what the manifest (of `describe`) says.

    library: `library_of` the output. report: name of a report file in the output. method: if it is
    in no registry.
    Result: a pure function of its arguments: no date, no machine. In the front matter, base_model
    lists those inputs that came from the hub (which have a commit) and no paths.
    Source: the hub's model cards; mergekit writes one with method, models and configuration.
    """
    method = method or method_named(manifest["method"])
    parts = [
        f"---\n{_front(manifest, library)}---",
        "# Merged model",
        _method(manifest, method),
        *_linked(report),
        f"## Models\n\n{_models(manifest, method)}",
        f"## Tensors\n\n{_tensors(manifest)}",
        f"## Configuration\n\n{_configuration(manifest)}",
        f"## Check\n\n{_check(manifest, method)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front(manifest: Mapping[str, Any], library: str | None) -> str:
    about: dict[str, Any] = {}
    names = (m["path"].partition("@")[0] for m in manifest["models"] if m.get("commit"))
    if repositories := list(dict.fromkeys(names)):
        about |= {"base_model": repositories, "base_model_relation": "merge"}
    if library is not None:
        about["library_name"] = library
    about["tags"] = ["merge", "mergekern"]
    text: str = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
    return text


def _method(manifest: Mapping[str, Any], method: Method) -> str:
    host = manifest["host"]
    version = manifest["mergekern"]
    text = f"Made by mergekern {version} with the method `{method.name}`: {_cited(method.doc)}"
    if host is not None:
        text += f"\n\nAs {host} computes it: {method.parity[host]}."
    if manifest["swept"]:
        each = ", ".join(_code(f"{name}: {value}") for name, value in manifest["swept"].items())
        text += f"\n\nOne point of a sweep, with {each} in the place of the configuration's."
    return text


def _cited(doc: str) -> str:
    """With links for numbers of arXiv."""
    return _ARXIV.sub(lambda found: f"[{found[0]}](https://arxiv.org/abs/{found[0]})", doc)


def _linked(report: str | None) -> Iterable[str]:
    if report is None:
        return
    if report.endswith(".png"):
        yield f"![norms, cosines and conflicts of the task vectors]({report})"
    else:
        yield f"[Report]({report}): norms, cosines and conflicts of the task vectors."


def _models(manifest: Mapping[str, Any], method: Method) -> str:
    configured = yaml.safe_load(manifest["config"]).get("base_model") is not None
    apart = configured and method.subtracts_base
    lines = ["| | model | commit | bytes | XXH3-128 of what was read |", "|---|---|---|---|---|"]
    for i, model in enumerate(manifest["models"]):
        role = "base" if apart and i == 0 else "model"
        size = sum(file["size"] for file in model["files"])
        read = [t["inputs"][str(i)] for t in manifest["tensors"].values() if str(i) in t["inputs"]]
        digest = _code(joined(read)) if read else "nothing"
        commit = _code(model["commit"]) if model.get("commit") else ""
        name = _code(model["path"]).replace("|", r"\|")
        lines.append(f"| {role} | {name} | {commit} | {size} | {digest} |")
    return "\n".join(lines)


def _tensors(manifest: Mapping[str, Any]) -> str:
    tensors = manifest["tensors"]
    merged = [t for t in tensors.values() if t["arguments"] is not None]
    copied = {key: t["dtype"] for key, t in tensors.items() if t["arguments"] is None}
    spared = [key for key, dtype in copied.items() if dtype in _FLOATS]
    whole = [key for key, dtype in copied.items() if dtype not in _FLOATS]
    count = Counter(t["dtype"] for t in tensors.values())
    dtypes = ", ".join(f"{dtype} ({n})" for dtype, n in sorted(count.items()))
    lines = [
        f"{len(tensors)} tensors, of dtype {dtypes}:",
        f"- {len(merged)} merged",
        *_listed("copied, as they hold no floating numbers and are the same in all models", whole),
        *_listed("copied from one model, as the configuration says or no other has them", spared),
        *_listed("dropped, as the configuration says", manifest["dropped"]),
    ]
    if manifest["left_out"]:
        names = ", ".join(map(_code, manifest["left_out"]))
        lines.append(f"\nFiles of the model folder that were left behind: {names}.")
    return "\n".join([lines[0], "", *lines[1:]])


def _listed(what: str, names: Iterable[str], shown: int = 8) -> Iterable[str]:
    """A line of a list, with the first names; mergekern_manifest.json has all."""
    names = list(names)
    if names:
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        yield f"- {len(names)} {what}: {', '.join(map(_code, names[:shown]))}{more}"


def _configuration(manifest: Mapping[str, Any]) -> str:
    text = manifest["config"].strip("\n")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}\n{fence}\n\nSeed of random masks: {manifest['seed']}."


def _check(manifest: Mapping[str, Any], method: Method) -> str:
    again = "mergekern verify . --replay '*'    # merge again, and compare\n"
    return f"""`mergekern_manifest.json` has the digests of every tensor, of the inputs it was made
of and of every file. In this folder:

```console
mergekern verify .                 # tensors and files against the manifest
mergekern verify . --inputs        # the inputs, too
{again if method.name in REGISTRY else ""}```

The plan of this merge is `{manifest["plan"]}`."""


def _code(text: str) -> str:
    """As code, whatever backticks and ends of lines are in it."""
    text = " ".join(str(text).split())
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"
