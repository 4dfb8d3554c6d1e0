"""page: the report of a merge, as one HTML page or one picture."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ArgumentError
from .figures import Drawn, figures, plain, short, worst_first
from .numbers import Row
from .summary import Summary, summarise

SUFFIXES = (".html", ".png")
_WIDTH = 11.0  # inches
_DPI = 110
_HEADING = 0.7

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2em auto;
  max-width: 75em; padding: 0 1em; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd; }
th { position: sticky; top: 0; background: #fff; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; }
"""


def check_report(path: str | PathLike[str]) -> None:
    """Raises ArgumentError where `page` could not write there: to be asked before a merge."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        expected = " or ".join(SUFFIXES)
        raise ArgumentError.of("report", "unknown kind of file", repr(suffix), expected)
    from ...align.picture import require_matplotlib  # the room of alignment takes half a second

    require_matplotlib("report")


def page(
    rows: Mapping[str, Row], path: str | PathLike[str], *, models: Sequence[str], title: str
) -> None:
    """Writes the report of a merge from `numbers` added up by tensor.

    Norms of the task vectors over depth, by kind of tensor; cosines between models, of all tensors
    and layer by layer; kept and conflicting elements, worst tensors first; the norm of what was
    merged against that of the mean. Where no base is subtracted the models stand for the task
    vectors, and nothing is kept or in conflict.

    rows: by name of tensor, in the order of the file. models: names, in the order of the numbers.
    Result: an .html file that needs nothing else, with a table of all tensors; or a .png of the
    figures. The same bytes for the same rows and version of matplotlib.
    Raises: ArgumentError for another suffix, without matplotlib, and where nothing was merged.
    """
    check_report(path)
    if not rows:
        raise ArgumentError.of("report", "nothing was merged", "0 tensors", "at least one")
    with np.errstate(all="ignore"):  # infinite norms have no cosines
        summary = summarise(rows, models)
        drawn = figures(summary)
        if Path(path).suffix.lower() == ".png":
            Path(path).write_bytes(_all(drawn, title))
        else:
            Path(path).write_text(_html(summary, drawn, title), encoding="utf-8")


def _all(drawn: Sequence[Drawn], title: str) -> bytes:
    """The figures one below the other, each under its heading."""
    from matplotlib.figure import Figure

    heights = [part for one in drawn for part in (_HEADING, one.height)]
    figure = Figure(figsize=(_WIDTH, _HEADING + sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(1 + len(heights), 1, height_ratios=[_HEADING, *heights])
    _head(parts[0], title, "")
    for one, head, body in zip(drawn, parts[1::2], parts[2::2], strict=True):
        _head(head, one.title, one.text)
        one.draw(body)
    return _saved(figure)


def _head(where: Any, title: str, text: str) -> None:
    where.text(0.5, 0.55, plain(short(title, 100)), ha="center", va="bottom", fontsize=12)
    where.text(0.5, 0.45, plain(text), ha="center", va="top", fontsize=8)


def _one(drawn: Drawn) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, drawn.height), layout="constrained")
    drawn.draw(figure)
    return _saved(figure)


def _saved(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()


# ---- HTML ------------------------------------------------------------------------------------


def _html(s: Summary, drawn: Iterable[Drawn], title: str) -> str:
    name = html.escape(title)
    listed = "".join(f"<li>{html.escape(m)}</li>" for m in s.models)
    sections = "".join(map(_section, drawn))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{name}</h1>
<ol start="0">{listed}</ol>
{sections}<h2>All tensors</h2>
<div class="wide">
{_table(s)}
</div>
</body>
</html>
"""


def _section(one: Drawn) -> str:
    data = base64.b64encode(_one(one)).decode()
    title, text = html.escape(one.title), html.escape(one.text)
    image = f'<img alt="{title}" src="data:image/png;base64,{data}">'
    return f"<h2>{title}</h2>\n<p>{text}</p>\n{image}\n"


def _table(s: Summary) -> str:
    n = range(len(s.models))
    columns: list[tuple[str, Any]] = [("elements", [f"{int(e)}" for e in s.sizes])]
    if s.conflict_shares is not None:
        columns.append(("conflicting", _percents(s.conflict_shares)))
    if s.kept_shares is not None:
        columns += [(f"kept of {i}", _percents(s.kept_shares[:, i])) for i in n]
    if len(s.models) > 1:
        columns.append(("least cosine", [_number(v, ".3f") for v in s.least_cosines]))
    columns += [(f"norm of {i}", [_number(v, ".4g") for v in s.norms[:, i]]) for i in n]
    columns.append(("norm of the mean", [_number(v, ".4g") for v in s.means]))
    columns.append(("norm of the merged", [_number(v, ".4g") for v in s.merged]))
    head = "".join(f"<th>{name}</th>" for name, _ in columns)
    lines = [f"<table>\n<thead><tr><th>tensor</th>{head}</tr></thead>\n<tbody>"]
    for t in worst_first(s):
        cells = "".join(f"<td>{values[t]}</td>" for _, values in columns)
        lines.append(f"<tr><td>{html.escape(s.keys[t])}</td>{cells}</tr>")
    return "\n".join([*lines, "</tbody>\n</table>"])


def _percents(shares: Iterable[float]) -> list[str]:
    return [_number(100 * v, ".1f", " %") for v in shares]


def _number(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{form}}{unit}"
