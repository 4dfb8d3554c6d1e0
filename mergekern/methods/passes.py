"""What must be known of all slices of a tensor, or of all tensors, before the first is merged."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from ..digits import Gather, alone

__all__ = ["Gather", "Passes", "Study", "Visit", "Visitor", "alone"]

Visitor = Callable[..., None]

# `visit(f)` reads every slice of a tensor, or every tensor that is merged, once, in the order of
# the plan, and calls `f(inputs, **arguments)`, with what `merge` will get. Each call is one more
# pass over the models.
Visit = Callable[[Visitor], None]

# Yields what each pass calls, and returns what was found. All processes make the same passes, each
# over its own tensors: whether another one follows is decided by what was gathered.
Passes = Generator[Visitor, None, Any]


@dataclass(frozen=True)
class Study:
    """`study(visit)` makes the passes and returns what they found."""

    passes: Callable[[Gather], Passes]

    def __call__(self, visit: Visit, gather: Gather = alone) -> Any:
        def one(visitor: Visitor) -> None:
            visit(lambda inputs, **arguments: visitor(inputs, 0, **arguments))

        return self.sweep(one, 1, gather)[0]

    def sweep(self, visit: Visit, points: int, gather: Gather = alone) -> list[Any]:
        """The same for several points with other arguments, in the passes of one.

        `visit(f)` calls `f(inputs, point, **arguments)` for every point of every slice; where
        points get the same `inputs`, what they have in common is counted once.
        """
        found: list[Any] = [None] * points
        running = dict(enumerate(self.passes(gather) for _ in range(points)))
        while True:
            waiting: dict[int, Visitor] = {}
            for point, run in list(running.items()):
                try:
                    waiting[point] = next(run)
                except StopIteration as end:
                    found[point] = end.value
                    del running[point]
            if not waiting:
                return found

            def each(
                inputs: Any, point: int, *, now: dict[int, Visitor] = waiting, **arguments: Any
            ) -> None:
                if point in now:
                    now[point](inputs, **arguments)

            visit(each)
