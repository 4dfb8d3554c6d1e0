"""What goes into blocks that run one after another."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import ArgumentError


class Captured(NamedTuple):
    """The arguments of one call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def moving(self) -> Any:
        """The first argument, which the block before has made."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def moved(self, x: Any) -> Captured:
        """The same call with another first argument."""
        if self.args:
            return Captured((x, *self.args[1:]), self.kwargs)
        return Captured((), {**self.kwargs, **dict.fromkeys(list(self.kwargs)[:1], x)})

    def others(self) -> Any:
        return tree_flatten(self.moved(None))


def fresh(arguments: Any) -> Any:
    """A copy: what a call writes into it, a tensor or a cache, does not reach the next call."""
    memo: dict[int, Any] = {}

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return copy.deepcopy(x, memo)
        return memo.setdefault(id(x), x.detach().clone())

    return tree_map(copied, arguments)


class _Reached(Exception):
    """The first block is called: nothing else of this pass is wanted."""


def block_names(op: str, model: nn.Module, blocks: str | Sequence[str]) -> list[str]:
    """Names of modules: those given, or the children of the one that is named."""
    modules = dict(model.named_modules())
    for name in [blocks] if isinstance(blocks, str) else blocks:
        if name not in modules:
            raise ArgumentError.of(op, "blocks name no module", repr(name), "one of the model's")
    if isinstance(blocks, str):
        blocks = [f"{blocks}.{child}" for child, _ in modules[blocks].named_children()]
    if not blocks:
        raise ArgumentError.of(op, "there are no blocks", 0, "one or more")
    return list(blocks)


def output_of(result: Any) -> Any:
    """What a block hands on: its result, or the first entry of a tuple."""
    return result[0] if isinstance(result, tuple) and result else result


def next_inputs(block: nn.Module, given: Captured) -> Captured:
    """The call of the block after this one. Writes into what is given, if the block does."""
    return given.moved(output_of(block(*given.args, **given.kwargs)))


def first_inputs(
    op: str,
    model: nn.Module,
    blocks: Sequence[str],
    calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
) -> list[Captured]:
    """The calls of the first block, one for each call of the model.

    The first call of the model is run to its end, to see that the blocks follow one another.
    """
    found: list[Captured] = []

    def look(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(Captured(args, kwargs))
        raise _Reached

    first = model.get_submodule(blocks[0])
    for args, kwargs in calls:
        if not found:
            _require_sequence(op, model, blocks, *fresh((args, kwargs)))
        hook = first.register_forward_pre_hook(look, with_kwargs=True)
        try:
            model(*args, **kwargs)
        except _Reached:
            continue
        finally:
            hook.remove()
    return found


def _require_sequence(
    op: str, model: nn.Module, blocks: Sequence[str], args: Any, kwargs: Any
) -> None:
    """Each block is called once, with the output of the one before and the other arguments as
    they were."""
    seen: list[tuple[str, Captured, Any]] = []
    hooks = []
    for name in blocks:

        def look(_: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            seen.append((name, Captured(args, kwargs), output_of(out)))

        hooks.append(model.get_submodule(name).register_forward_hook(look, with_kwargs=True))
    try:
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    called = [name for name, _, _ in seen]
    if called != list(blocks):
        raise ArgumentError.of(op, "blocks are called otherwise", called, list(blocks))
    for (before, its, out), (name, given, _) in itertools.pairwise(seen):
        if given.moving is not out or not _same(given.others(), its.others()):
            what = f"block {name} takes something else than the output of {before}"
            got = type(given.moving).__name__
            expected = "it as the first argument, and the same others"
            raise ArgumentError.of(op, what, got, expected)


def _same(x: Any, y: Any) -> bool:
    (a, in_a), (b, in_b) = x, y
    return in_a == in_b and all(
        torch.equal(u, v) if isinstance(u, Tensor) and isinstance(v, Tensor) else u == v
        for u, v in zip(a, b, strict=True)
    )
