"""Names of tensors: those of one model in the words of another, and which of them are merged."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..methods.compat import Signature

Pairs = tuple[tuple[str, str], ...]

# What libraries have renamed, from the older name to the newer. Parts of names: see `Naming`.
RENAMES: Mapping[str, Pairs] = {
    "LayerNorm of TensorFlow (BERT)": (
        ("LayerNorm.gamma", "LayerNorm.weight"),
        ("LayerNorm.beta", "LayerNorm.bias"),
    ),
    "weight norm of torch 2 (wav2vec 2.0, HuBERT)": (
        ("weight_g", "parametrizations.weight.original0"),
        ("weight_v", "parametrizations.weight.original1"),
    ),
    "attention of transformers 5 (DINOv2)": (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ),
    "layers of transformers 5 (ViT, DeiT, BEiT)": (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("encoder.layer", "layers"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ),
    "parts of transformers 4.52 (LLaVA, InternVL)": (
        ("language_model.lm_head", "lm_head"),
        ("language_model.model", "model.language_model"),
        ("vision_tower", "model.vision_tower"),
        ("multi_modal_projector", "model.multi_modal_projector"),
    ),
    "parts of transformers 4.52 (Qwen-VL)": (
        ("visual", "model.visual"),
        ("model.embed_tokens", "model.language_model.embed_tokens"),
        ("model.layers", "model.language_model.layers"),
        ("model.norm", "model.language_model.norm"),
    ),
    "MLP of torchvision 0.13 (ViT)": (("mlp.linear_1", "mlp.0"), ("mlp.linear_2", "mlp.3")),
}
_VOCABULARY = re.compile(r"embed|wte|lm_head|vocab|predictions\.(decoder|bias)")
_PROBES = 32


@dataclass(frozen=True)
class Naming:
    """How the tensors of a model are called in the merge.

    prefix: a name that begins with the first text begins with the second instead. renames: in
    turn, one text instead of another wherever that stands between dots or the ends of the name
    ("LayerNorm.gamma" is in "output.LayerNorm.gamma", not in "myLayerNorm.gamma").
    """

    prefix: tuple[str, str] = ("", "")
    renames: Pairs = ()

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Naming:
        """Of what `vars` gives, through JSON and back."""
        old, new = plain["prefix"]
        return cls((old, new), tuple((a, b) for a, b in plain["renames"]))

    def name(self, stored: str) -> str:
        old, new = self.prefix
        name = new + stored.removeprefix(old) if stored.startswith(old) else stored
        for old, new in self.renames:
            if old in name:  # spares most names the pattern
                name = _part(old).sub(new.replace("\\", r"\\"), name)
        return name

    def names(self, stored: Iterable[str], owner: object) -> dict[str, str]:
        """Stored name -> name in the merge, for one file.

        Raises: CheckpointError where two tensors come to one name.
        """
        found = {s: self.name(s) for s in stored}
        back: dict[str, str] = {}
        for s, n in found.items():
            if n in back:
                raise CheckpointError(
                    f"keys: two tensors of {owner} come to one name; got {back[n]} and {s} as {n}; "
                    "expected a prefix and renames that keep them apart"
                )
            back[n] = s
        return found

    def check(self, stored: Collection[str], owner: object) -> None:
        """Raises: CheckpointError where no name of the model changes."""
        if self != AS_STORED and all(self.name(s) == s for s in stored):
            raise CheckpointError(
                f"keys: prefix and renames change no name of {owner}; got {self}; "
                f"expected what its names hold, such as {min(stored)}"
            )

    def __str__(self) -> str:
        """The lines of the configuration, in one."""
        lines = []
        if self.prefix != ("", ""):
            old, new = map(json.dumps, self.prefix)
            lines.append(f"prefix: {{from: {old}, to: {new}}}")
        if self.renames:
            lines.append(f"renames: {json.dumps(self.renames)}")
        return "; ".join(lines)


AS_STORED = Naming()


def _part(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![^.]){re.escape(text)}(?![^.])")


# ---- which are merged --------------------------------------------------------------------------


def select(names: Iterable[str], only: Sequence[str], skip: Sequence[str]) -> set[str]:
    """The names that are merged: they fit one of `only`, if there are any, and none of `skip`.

    A pattern fits a whole name, case and all; `*` stands for any text, `?` for one character,
    `[0-5]` for one of these (Python's fnmatch).

    Raises: CheckpointError where a pattern fits no name, or no name is left.

    >>> sorted(select(["vision.w", "vision.b", "text.w"], only=["vision.*"], skip=["*.b"]))
    ['vision.w']
    """
    names = list(names)
    fits = {p: re.compile(fnmatch.translate(p)).match for p in (*only, *skip)}
    fitting = {p: set(filter(match, names)) for p, match in fits.items()}
    for key, patterns in (("only", only), ("skip", skip)):
        for p in patterns:
            if not fitting[p]:
                raise CheckpointError(
                    f"keys: a pattern of '{key}' fits no tensor; got {p!r}; expected one that fits "
                    f"whole names, such as {f'*{p}*'!r}"
                )
    chosen = set().union(*(fitting[p] for p in only)) if only else set(names)
    chosen -= set().union(*(fitting[p] for p in skip))
    if not chosen:
        raise CheckpointError(
            f"keys: 'only' and 'skip' leave no tensor to merge; got {list(only)} and {list(skip)}; "
            "expected at least one tensor"
        )
    return chosen


# ---- why names disagree ------------------------------------------------------------------------


def misnamed(models: Mapping[str, Collection[str]]) -> str | None:
    """One sentence, with the lines that settle it, if models name tensors in other words.

    None if they have not: what is missing then is really missing.
    """
    (first, own), *others = models.items()
    found = {label: naming for label, names in others if (naming := _naming(own, names))}
    if not found:
        return None
    label, naming = next(iter(found.items()))
    stored = next(s for s in models[label] if naming.name(s) != s and naming.name(s) in own)
    lines = ", and ".join(f"at model {label}: {naming}" for label, naming in found.items())
    reasons = {what for what, pairs in RENAMES.items() for n in found.values() if _uses(n, pairs)}
    why = f" ({', '.join(sorted(reasons))})" if reasons else ""
    return (
        f"keys: models name the same tensors differently{why}; got {stored} in {label} for "
        f"{naming.name(stored)} in {first}; expected in the configuration, {lines}"
    )


def _uses(naming: Naming, pairs: Pairs) -> bool:
    return naming.renames in (pairs, _reversed(pairs))


def _reversed(pairs: Pairs) -> Pairs:
    return tuple((new, old) for old, new in reversed(pairs))


def _naming(own: Collection[str], names: Collection[str]) -> Naming | None:
    """The naming under which most of `names` are in `own`, if any helps.

    A prefix counts if it stands before most names of the smaller model: two heads that are called
    differently are no such thing.
    """
    own, names = set(own), sorted(names)
    best, most = None, len(own.intersection(names))
    ends: dict[str, list[str]] = {}
    for o in own:
        ends.setdefault(o.rpartition(".")[2], []).append(o)
    for renames in ((), *RENAMES.values(), *map(_reversed, RENAMES.values())):
        renamed = list(map(Naming(renames=renames).name, names))
        if renames and renamed == names:
            continue
        for prefix in _prefixes(ends, renamed):
            naming = Naming(prefix, renames)
            found = set(map(naming.name, names))
            moved = sum(n.startswith(prefix[0]) for n in names) if any(prefix) else len(names)
            if (
                len(found) == len(names)
                and len(found & own) > most
                and 2 * moved > min(len(own), len(names))
            ):
                best, most = naming, len(found & own)
    return best


def _prefixes(
    ends: Mapping[str, Collection[str]], names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """No prefix, then those that bring some of the names to one of the others, by last part."""
    yield "", ""
    tried = set()
    for name in names[:: max(1, len(names) // _PROBES)]:
        parts = name.split(".")
        others = ends.get(parts[-1], ())
        for i in range(len(parts)):
            tail = ".".join(parts[i:])
            heads = {o[: len(o) - len(tail)] for o in others if f".{o}".endswith(f".{tail}")}
            for head in sorted(heads)[:4]:
                prefix = (name[: len(name) - len(tail)], head)
                if prefix not in tried and prefix[0] != prefix[1]:
                    tried.add(prefix)
                    yield prefix
            if heads:
                break


def vocabularies(models: Mapping[str, Mapping[str, Signature]]) -> str | None:
    """One sentence if embeddings or heads have a row for each token of different vocabularies."""
    (first, own), *others = models.items()
    for name, (_, shape) in own.items():
        for label, signatures in others:
            other = signatures[name].shape if name in signatures else shape
            if shape[:1] != other[:1] and shape[1:] == other[1:] and _VOCABULARY.search(name):
                return (
                    f"the vocabularies differ: {name} has {shape[0]} rows in {first}, {other[0]} "
                    f"in {label}; bring the models to one tokenizer first (transformers: "
                    "resize_token_embeddings), or copy these tensors"
                )
    return None
