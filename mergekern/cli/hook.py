"""mergekern hook on|off"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class State(str, Enum):
    on = "on"
    off = "off"
    status = "status"


def hook(
    state: Annotated[
        State, typer.Argument(help="on writes the file, off removes it")
    ] = State.status,
) -> None:
    """Let MERGEKERN=1 put mergekern under mergekit's own commands.

    Writes (or removes) one start-up line in site-packages. It does nothing unless the variable is
    set when Python starts.
    """
    from ..integrations.mergekit import hook as mergekit_hook

    if state is State.on:
        mergekit_hook.write()
    elif state is State.off:
        mergekit_hook.remove()
    there = mergekit_hook.path().exists()
    print(f"{mergekit_hook.path()}: {'there' if there else 'not there'}")
    if there:
        print("MERGEKERN=1 mergekit-yaml ... now runs on mergekern; without it nothing changes")
