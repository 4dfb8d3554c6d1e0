"""How a call of the command line ends."""

from __future__ import annotations

from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]  # arguments -> exit code, stdout, stderr


def one_line(code: int, printed: str, errors: str) -> str:
    """The error of ours, which is all that is printed."""
    assert code == 2
    assert printed == ""
    assert "Traceback" not in errors
    assert errors.startswith("mergekern: ")
    return errors
