"""write_report: a study of adapters as a picture and as numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..align.picture import require_matplotlib
from ..engine.report.figures import COLOURS, plain, short
from ..errors import ArgumentError
from .study import Study

PICTURE, NUMBERS = "report.png", "report.json"
_OP = "report"
_ACROSS = 4  # panels side by side
_PANELS = 12  # of adapters
_IN_CELLS = 10  # adapters up to which a number is written into its cell
_NAMES = 32  # modules along an axis whose names can be told apart
_SHARES = (10, 50, 90)  # percentiles of the modules
_DPI = 110


def check_report(folder: str | PathLike[str]) -> None:
    """Raises ArgumentError where `write_report` could not: to be asked before a merge."""
    for name in (PICTURE, NUMBERS):
        if (path := Path(folder) / name).exists():
            raise ArgumentError.of(_OP, f"{name} exists", path, "a folder without one")
    require_matplotlib(_OP)


def write_report(
    study: Study, folder: str | PathLike[str], *, names: Sequence[str], title: str
) -> None:
    """Writes report.png, of the figures below, and report.json, the numbers that they show.

    Singular values of each adapter's task vectors, percentiles of the modules; alignment of the
    adapters' column and row spaces, means of the modules; and of a merge the norm of each module
    against that of the sum of the task vectors, with what a truncation left out.

    names: of the adapters, in their order. folder: made if it is not there.
    Result: the same bytes for the same study and version of matplotlib.
    Raises: ArgumentError without matplotlib, or where a report is there.
    """
    check_report(folder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"title": title, "adapters": [*names], **study.plain()}
    text = json.dumps(numbers, indent=1, allow_nan=False) + "\n"
    (folder / NUMBERS).write_text(text, encoding="utf-8")
    _figure(study, names, title).savefig(
        folder / PICTURE, format="png", dpi=_DPI, metadata={"Software": None}
    )


def _figure(study: Study, names: Sequence[str], title: str) -> Any:
    from matplotlib.figure import Figure

    n = len(names)
    panels = min(n, _PANELS)
    merged = any(m.kept is not None for m in study.modules.values())
    heights = [0.9 + 2.1 * -(-panels // _ACROSS)]
    heights += [max(2.8, 0.36 * n + 1.2)] * (n > 1) + [3.6] * merged
    figure = Figure(figsize=(11, 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(plain(title), fontsize=12)
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    _spectra(next(parts), study, names[:panels], n)
    if n > 1:
        _alignments(next(parts), study, names)
    if merged:
        _kept(next(parts), study)
    return figure


def _spectra(where: Any, study: Study, names: Sequence[str], of: int) -> None:
    """Of the first adapters of so many."""
    found = [[m.spectra[i] or [] for m in study.modules.values()] for i in range(len(names))]
    longest = max((len(s) for spectra in found for s in spectra), default=0)
    rows = -(-len(names) // _ACROSS)
    across = -(-len(names) // rows)
    axes = where.subplots(rows, across, squeeze=False, sharex=True, sharey=True)
    for i, each in enumerate(axes.ravel()):
        if i >= len(names):
            each.set_axis_off()
            continue
        values = np.full((len(found[i]), longest), np.nan)
        for row, s in zip(values, found[i], strict=True):
            row[: len(s)] = s
        values = values[:, np.isfinite(values).any(0)]
        index = range(1, 1 + values.shape[1])
        if len(index):
            low, middle, high = np.nanpercentile(values, _SHARES, axis=0)
            each.fill_between(index, low, high, color=COLOURS[0], alpha=0.25, linewidth=0)
            each.plot(index, middle, ".-", color=COLOURS[0], markersize=4, linewidth=1.3)
        each.set_yscale("log")
        each.xaxis.get_major_locator().set_params(integer=True)
        each.set_title(plain(f"{i}: {short(names[i])}"), fontsize=9)
        each.tick_params(labelsize=7, labelbottom=i + across >= len(names))
        each.grid(alpha=0.3)
    where.supxlabel("singular value, the largest first", fontsize=8)
    title = f"Singular values of the task vectors: median of {len(study.modules)} modules, "
    title += f"percentiles {_SHARES[0]} to {_SHARES[-1]}"
    if len(names) < of:
        title += f"; the first {len(names)} of {of} adapters"
    where.suptitle(title, fontsize=10)


def _alignments(where: Any, study: Study, names: Sequence[str]) -> None:
    n = len(names)
    both = (("column spaces, written to", study.columns()), ("row spaces, read", study.rows()))
    for side, (axes, (title, matrix)) in enumerate(zip(where.subplots(1, 2), both)):
        values = matrix.numpy().copy()
        np.fill_diagonal(values, np.nan)  # 1, and of no interest
        highest = float(np.nan_to_num(values).max()) or 1.0
        axes.set_facecolor("#DDDDDD")
        shown = axes.imshow(values, cmap="Blues", vmin=0, vmax=highest, interpolation="nearest")
        axes.set_xticks(range(n), [str(i) for i in range(n)], fontsize=7)
        labels = [plain(f"{i}: {short(name)}") for i, name in enumerate(names)]
        axes.set_yticks(range(n), labels if side == 0 else [str(i) for i in range(n)], fontsize=7)
        axes.set_title(f"{title} (by chance {study.chance(side):.2f})", fontsize=9)
        if n <= _IN_CELLS:
            for (i, j), v in np.ndenumerate(values):
                if np.isfinite(v):
                    colour = "white" if v > 0.6 * highest else "black"
                    axes.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=7, color=colour)
        where.colorbar(shown, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    where.suptitle(
        "Alignment of the task vectors' spaces: mean squared cosine of principal angles, mean of "
        "the modules",
        fontsize=10,
    )


def _kept(where: Any, study: Study) -> None:
    modules = [*study.modules]
    kept = [math.nan if (k := m.kept) is None else k for m in study.modules.values()]
    lost = [math.nan if (x := m.lost) is None else x for m in study.modules.values()]
    axes = where.subplots()
    places = range(len(modules))
    axes.bar(places, kept, color=COLOURS[-1], label="norm of the merged / norm of the sum")
    if not all(map(math.isnan, lost)):
        style = {"color": COLOURS[1], "markersize": 4, "clip_on": False}
        axes.plot(places, lost, "D", label="left out by truncation", **style)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    step = -(-len(modules) // _NAMES)
    ticks = [plain(short(name, 24)) for name in modules[::step]]
    axes.set_xticks(places[::step], ticks, rotation=90, fontsize=7)
    axes.set_xlim(-0.6, len(modules) - 0.4)
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)
    where.suptitle("What the merge kept of each module", fontsize=10)
