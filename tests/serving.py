"""Which backends are under test, where their tensors live, and who served a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from mergekern import dispatch

_Case = TypeVar("_Case")

UNDER_TEST = ("torch", "cpu", "cuda", "triton")


def device_of(backend: str) -> str:
    """Where the tensors of a test of `backend` live."""
    on_host = {"cuda": dispatch.emulating(), "triton": dispatch.interpreting()}
    return "cpu" if on_host.get(backend, True) else "cuda"


def interpreted(backend: str) -> bool:
    """Whether its kernels run under Triton's interpreter, at some 10 ms a program."""
    return backend == "triton" and dispatch.interpreting()


def on_host(backend: str) -> bool:
    """Whether its GPU kernels run on the host, one thread of theirs after another."""
    return interpreted(backend) or (backend == "cuda" and dispatch.emulating())


def affordable(backend: str, n: int) -> int:
    """n elements, or so many that an interpreted backend is done in a second: a few programs and
    part of one."""
    return min(n, 9 * 1024 + 77) if interpreted(backend) else n


def affordable_shape(backend: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same with its longest axis cut to that."""
    longest = max(range(len(shape)), key=lambda axis: shape[axis])
    others = math.prod(shape) // shape[longest]
    cut = affordable(backend, math.prod(shape)) // others
    return (*shape[:longest], cut, *shape[longest + 1 :])


def in_turn(backend: str, cases: Sequence[_Case], turn: int) -> Sequence[_Case]:
    """All cases, or one of them for an interpreted backend: the next one with the next turn."""
    at = turn % len(cases)
    return cases[at : at + 1] if interpreted(backend) else cases


def serving(op: str) -> list[str]:
    """The backends that have a kernel for `op`."""
    return [b for b in UNDER_TEST if op in dispatch.KERNELS.get(b, dispatch.OPS)]


class Calls(list[tuple[str, str]]):
    """(backend, function) of every call that went through dispatch."""

    def backends(self) -> set[str]:
        return {backend for backend, _ in self}
