"""The command line: one file per command, all errors of ours as one line and exit code 2."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from ..errors import MergekernError
from . import bench, demo, doctor, hook, inspect, merge, verify, zip

app = typer.Typer(
    name="mergekern",
    help="The compiled engine under model merging.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("merge")(merge.merge)
app.command("zip")(zip.zip)
app.command("verify")(verify.verify)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.command("hook")(hook.hook)
app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    bench.bench
)


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 for a failed command, 2 for anything the user can mend."""
    warnings.showwarning = _one_line
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=given, prog_name="mergekern")
    except SystemExit as done:  # typer ends every command, and usage errors, this way
        return done.code if isinstance(done.code, int) else 0
    except (MergekernError, OSError) as error:
        if "--verbose" in given or "-v" in given:
            traceback.print_exc()
        print(f"mergekern: {error}", file=sys.stderr)
        return 2
    return 0


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"mergekern: {message}", file=sys.stderr)


def main() -> None:
    sys.exit(run())
