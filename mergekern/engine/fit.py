"""Whether the tensors of the models fit together, and what to do with those that do not.

Nothing here touches weights but the integer buffers, which must be equal to be copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ArgumentError, CheckpointError
from ..methods.compat import agree, identical
from .checkpoint import Checkpoint
from .config import ExceptionRule, MergeConfig
from .float8 import floating, unmergeable
from .keys import AS_STORED, misnamed, select, vocabularies

Rules = dict[str, ExceptionRule]


def rules_of(config: MergeConfig, checkpoints: Sequence[Checkpoint]) -> Rules:
    """Tensor -> the first exception whose filter it contains; else what `only` and `skip` say.

    A tensor that is not merged is that of the home model; if that lacks it, the result does.
    """
    keys = dict.fromkeys(key for c in checkpoints for key in c.signatures)
    rules: Rules = {}
    for rule in config.exceptions:
        fitting = [key for key in keys if rule.filter in key]
        if not fitting:
            raise CheckpointError(f"exception {rule.filter!r} fits no tensor")
        for key in fitting:
            rules.setdefault(key, rule)
    home = checkpoints[config.paths.index(config.home)]
    chosen = select(keys, config.only, config.skip)
    for key in keys:
        if key not in chosen:
            kept = key in home.signatures
            rule = ExceptionRule(key, "copy", config.home) if kept else ExceptionRule(key, "drop")
            rules.setdefault(key, rule)
    return rules


def require_fit(config: MergeConfig, checkpoints: Sequence[Checkpoint], rules: Rules) -> None:
    """Raises CheckpointError with all that do not fit and that no rule settles."""
    problems = _misfits(config, checkpoints, rules)
    if problems:
        models = {path: c.signatures for path, c in zip(config.paths, checkpoints, strict=True)}
        raise CheckpointError(
            _misnamed(config, checkpoints) or _listing(problems, vocabularies(models))
        )


def _misnamed(config: MergeConfig, checkpoints: Sequence[Checkpoint]) -> str | None:
    """What is wrong with the names of models for which the configuration does not say it yet."""
    names = {
        path: c.names
        for path, c, naming in zip(config.paths, checkpoints, config.namings, strict=True)
        if c is checkpoints[0] or naming == AS_STORED
    }
    return misnamed(names)


def _listing(problems: dict[str, str], note: str | None) -> str:
    lines = "".join(f"\n  {key}: {what}" for key, what in problems.items())
    lines += f"\n  {note}" if note else ""
    noun = "tensor does" if len(problems) == 1 else "tensors do"
    return (
        f"{len(problems)} {noun} not fit; say in the configuration what to do with them "
        f"(exceptions: filter, action copy, drop or present):{lines}"
    )


def _misfits(
    config: MergeConfig, checkpoints: Sequence[Checkpoint], rules: Rules
) -> dict[str, str]:
    labels = [str(c.path) for c in checkpoints]
    if len(set(labels)) < len(labels):  # the same checkpoint may be listed twice
        labels = [f"{label} (#{i})" for i, label in enumerate(labels)]
    problems = agree(
        {
            label: {k: s for k, s in c.signatures.items() if k not in rules}
            for label, c in zip(labels, checkpoints, strict=True)
        }
    )
    for key, rule in rules.items():
        having = [i for i, c in enumerate(checkpoints) if key in c.signatures]
        if rule.action == "copy" and config.paths.index(str(rule.source)) not in having:
            problems[key] = f"missing from {rule.source}, which it is to be copied from"
        elif rule.action == "present":
            if config.base_apart and 0 not in having:
                problems[key] = f"missing from the base {labels[0]}"
            some = {labels[i]: {key: checkpoints[i].signatures[key]} for i in having}
            problems.update(agree(some))
            models = len(having) - config.base_apart
            if key not in problems and models:
                try:
                    config.method.check_count(models, config.base_apart)
                except ArgumentError as error:
                    problems[key] = str(error)
    for key in dict.fromkeys(key for c in checkpoints for key in c.signatures):
        if key not in problems and (key not in rules or rules[key].action == "present"):
            having = [i for i, c in enumerate(checkpoints) if key in c.signatures]
            result = config.out_dtype or config.dtype
            problems.update(_unfit(key, checkpoints, having, labels, result))
    return problems


def _unfit(
    key: str,
    checkpoints: Sequence[Checkpoint],
    having: list[int],
    labels: list[str],
    result: torch.dtype | None,
) -> dict[str, str]:
    """What is wrong with a tensor that is copied where all have the same, but they do not.

    Or that has eight bits an element.
    """
    signature = checkpoints[having[0]].signatures[key]
    if floating(signature.dtype):
        models = {labels[i]: checkpoints[i].signatures for i in having}
        wrong = unmergeable(key, models, result)
        return {key: wrong} if wrong else {}
    first = checkpoints[having[0]].read(key)
    other = [labels[i] for i in having[1:] if not identical(checkpoints[i].read(key), first)]
    if not other:
        return {}
    kind = signature.dtype_class()
    return {key: f"{kind} values differ in {', '.join(other)}; they cannot be averaged"}
