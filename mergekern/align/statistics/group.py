"""Accumulators of several processes: what each saw of its own batches, merged."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError
from ...ops.covariance import Covariance

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SHOWN = 40  # characters that a sentence shows of what differs


class Group:
    """The processes of a group of torch.distributed; None: this one by itself."""

    def __init__(self, op: str, group: ProcessGroup | None) -> None:
        self._op, self._group = op, group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())

    def gather(self, mine: Any) -> list[Any]:
        """What each process gives, in the order of ranks."""
        if self._group is None:
            return [mine]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self._group)
        return found

    def require_same(self, **given: str) -> None:
        """Whether all processes were given the same."""
        for name, mine in given.items():
            each = self.gather(mine)
            for rank, its in enumerate(each):
                if its != each[0]:
                    what = f"rank {rank} was given other {name} than rank 0"
                    raise ArgumentError.of(self._op, what, its[:_SHOWN], each[0][:_SHOWN])

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """An error in the block, in any process, ends it in all of them."""
        try:
            yield
        except Exception as error:
            self.gather(str(error))
            raise
        for rank, text in enumerate(self.gather(None)):
            if text is not None:
                raise ArgumentError.of(self._op, f"rank {rank} has failed", repr(text), "no error")

    def merge(self, found: Covariance) -> None:
        """Adds the rows that all other processes have seen, in all of them.

        By a tree of merges in the order of ranks: each accumulator is merged once, and all
        processes get the same bits.
        """
        if self._group is None:
            return
        import torch.distributed as dist

        step = 1
        while step < self.size and self.rank % (2 * step) == 0:
            if self.rank + step < self.size:
                other = copy.deepcopy(found)
                self._pass(other, partial(dist.recv, group_src=self.rank + step))
                found.merge(other)
            step *= 2
        if step < self.size:
            self._pass(found, partial(dist.send, group_dst=self.rank - step))
        self._pass(found, partial(dist.broadcast, group_src=0))

    def _pass(self, found: Covariance, move: Callable[..., Any]) -> None:
        """An accumulator to another process or from it."""
        import torch.distributed as dist

        wire = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        state = {name: x.to(wire) for name, x in found.state_dict().items()}
        for x in state.values():
            move(x, group=self._group)
        found.load_state_dict(state)
