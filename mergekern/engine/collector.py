"""Python's collector of cycles, kept from walking over the plan of a large model.

It visits all objects alive whenever their number has grown by a quarter: half of the time of a
merge of 20,000 tiny tensors. Nothing that is built here has cycles.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No collections: for what builds data about all tensors, or imports torch, and soon ends."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def spared() -> Iterator[None]:
    """Collections pass over what there is now: for the time that a merge takes.

    A process that has frozen objects itself keeps its own order of things.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
