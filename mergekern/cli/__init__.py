"""The command line: one file per command, all errors of ours as one line and exit code 2.

torch and the engine are imported by a command when it runs, so that --help answers at once.
"""

from __future__ import annotations

import gc
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .. import __version__
from ..engine.ranks import label
from ..errors import MergekernError
from . import adapters, bench, demo, doctor, hook, inspect, merge, verify, zip
from .stopping import Stopped, stoppable

app = typer.Typer(
    name="mergekern",
    help="The compiled engine under model merging.",
    epilog="Exit codes: 0 done; 1 a comparison (verify) or a benchmark failed, or nobody reads the "
    "output; 2 an error that the last line names; 130 stopped by Ctrl-C; 143 stopped by SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("merge")(merge.merge)
app.command("zip")(zip.zip)
app.command("adapters")(adapters.adapters)
app.command("verify")(verify.verify)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.command("hook")(hook.hook)
app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    bench.bench
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mergekern {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 for a failed command, 2 for anything the user can mend, 130 and 143 for
    a command that Ctrl-C or SIGTERM stopped."""
    warnings.showwarning = _one_line
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stoppable():
            app(args=given, prog_name="mergekern")
    except Stopped as stopped:
        _say(stopped.text)
        return stopped.code
    except SystemExit as done:  # typer ends every command, and usage errors, this way
        return done.code if isinstance(done.code, int) else 0
    except (MergekernError, OSError) as error:
        if "--verbose" in given or "-v" in given:
            traceback.print_exc()
        _say(error)
        return 2
    return 0


def _say(what: object) -> None:
    print(f"mergekern: {label()}{what}", file=sys.stderr)


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(message)


def main() -> None:
    code = run()
    gc.freeze()  # else Python's end looks through all objects of torch several times: 0.4 s
    sys.exit(code)
