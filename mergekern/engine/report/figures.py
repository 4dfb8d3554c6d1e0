"""The figures of a report: norms over depth, cosines, shares, and the length of what was merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .summary import Array, Summary

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLES = ("-", "--", ":", "-.")  # once the colours are used up
_PANELS = 11  # of the largest kinds of tensors, beside one of whole layers
_ACROSS = 4  # panels side by side
_BARS = 24  # tensors whose names can be read one below the other
_TICKS = 12  # names of layers along an axis
_IN_CELLS = 8  # models up to which a cosine is written into its cell
_PAIRS = 36  # of models whose names can be read one below the other
_LONGEST = 30  # letters of a name


class Drawn(NamedTuple):
    """One figure: its heading, what it shows, its height in inches, how it is drawn."""

    title: str
    text: str
    height: float
    draw: Callable[[Any], None]


def figures(s: Summary) -> list[Drawn]:
    """Those that these numbers allow."""
    found = [_norms(s)]
    if len(s.models) > 1:
        found.append(_cosines(s))
    if s.conflict_shares is not None:
        found.append(_shares(s))
    found.append(_lengths(s))
    return found


def short(name: str, longest: int = _LONGEST) -> str:
    """The end of a name, which tells tensors and models apart."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def plain(text: str) -> str:
    """For matplotlib, which takes what stands between two $ for a formula."""
    return text.replace("$", r"\$")


def _label(s: Summary, i: int) -> str:
    return plain(f"{i}: {short(s.models[i])}")


# ---- norms over depth ------------------------------------------------------------------------


def _norms(s: Summary) -> Drawn:
    kinds = s.kinds()
    largest = sorted(kinds, key=lambda k: -_weight(s, [t for _, t in kinds[k]]))[:_PANELS]
    panels: list[tuple[str, list[tuple[float, Array]]]] = []
    if s.layers:
        joint = [(float(i), s.joint_norms(layer.tensors)) for i, layer in enumerate(s.layers)]
        panels.append(("all tensors of a layer", joint))
    panels += [(kind, [(float(i), s.norms[t]) for i, t in kinds[kind]]) for kind in largest]
    outside = sorted(s.outside, key=lambda t: -_weight(s, [t]))[:_BARS]
    rows = -(-len(panels) // _ACROSS)
    below = 0.6 + 0.24 * len(outside) if outside else 0.0
    above = 2.3 * rows

    def draw(where: Any) -> None:
        heights = [h for h in (above, below) if h]
        parts = where.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        if panels:
            across = min(_ACROSS, len(panels))
            all_axes = parts[0].subplots(rows, across, squeeze=False).ravel()
            for axes, (title, points) in zip(all_axes, panels):
                _lines(axes, s, points)
                axes.set_title(plain(short(title)), fontsize=9)
                _depth(axes, s)
            for axes in all_axes[len(panels) :]:
                axes.set_axis_off()
        if outside:
            _dots(parts[-1].subplots(), s, outside)
        handles = [_handle(i) for i in range(len(s.models))]
        names = [_label(s, i) for i in range(len(s.models))]
        where.legend(handles, names, loc="outside upper center", ncols=4, fontsize=7)

    text = f"|x| of each of the {s.compared}. "
    stacks = dict.fromkeys(layer.stack for layer in s.layers)
    if len(stacks) > 1:
        text += f"Stacks of layers, left to right: {', '.join(x.rstrip('.') for x in stacks)}. "
    if len(kinds) > len(largest):
        text += f"Shown are the {len(largest)} largest of {len(kinds)} kinds of tensors. "
    if len(s.outside) > len(outside):
        text += f"Of {len(s.outside)} tensors outside of layers the {len(outside)} largest. "
    title = f"Norm of the {s.compared}" + (" over depth" if panels else "")
    return Drawn(title, text, above + below + 0.7, draw)


def _weight(s: Summary, tensors: list[int]) -> float:
    return float(np.nansum(s.norms[tensors] ** 2))


def _handle(i: int) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **_style(i))


def _style(i: int) -> dict[str, Any]:
    style = STYLES[i // len(COLOURS) % len(STYLES)]
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": style, "linewidth": 1.3}


def _lines(axes: Any, s: Summary, points: list[tuple[float, Array]]) -> None:
    """A line per model, broken between stacks of layers."""
    where = np.array([x for x, _ in points])
    values = np.stack([v for _, v in points])
    stacks = [s.layers[int(x)].stack for x in where]
    breaks = [i for i in range(1, len(stacks)) if stacks[i] != stacks[i - 1]]
    where = np.insert(where, breaks, np.nan)
    values = np.insert(values, breaks, np.nan, axis=0)
    for i in range(len(s.models)):
        axes.plot(where, values[:, i], marker=".", markersize=4, **_style(i))
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # room above lines that are level
    axes.grid(alpha=0.3)


def _depth(axes: Any, s: Summary) -> None:
    """Layers along the x axis, by their number in the stack; stacks divided by lines."""
    count = len(s.layers)
    step = -(-count // _TICKS)
    starts = [i for i in range(count) if not i or s.layers[i].stack != s.layers[i - 1].stack]
    ticks = [i for a, b in zip(starts, [*starts[1:], count]) for i in range(a, b, step)]
    if len(starts) > 1 and len(ticks) > 2 * _TICKS:
        ticks = starts[:: -(-len(starts) // _TICKS)]
    axes.set_xticks(ticks, [str(s.layers[i].number) for i in ticks], fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlim(-0.5, count - 0.5)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="#666666", linewidth=0.6)


def _dots(axes: Any, s: Summary, tensors: list[int]) -> None:
    """Tensors outside of layers: a dot per model."""
    places = range(len(tensors))
    for i in range(len(s.models)):
        axes.plot(s.norms[tensors, i], places, "o", markersize=4, color=_style(i)["color"])
    _names(axes, s, tensors)
    axes.set_title("tensors outside of layers", fontsize=9)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _names(axes: Any, s: Summary, tensors: Sequence[int]) -> None:
    """Names of tensors down the y axis."""
    axes.set_yticks(range(len(tensors)), [plain(short(s.keys[t], 48)) for t in tensors], fontsize=7)
    axes.set_ylim(len(tensors) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)


# ---- cosines ---------------------------------------------------------------------------------


def _cosines(s: Summary) -> Drawn:
    n = len(s.models)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]

    def draw(where: Any) -> None:
        columns = where.subfigures(1, 2, width_ratios=(1, 1)) if s.layers else [where]
        axes = columns[0].subplots()
        whole = s.cosines(range(len(s.keys)))
        shown = _heat(axes, whole, aspect="equal")
        axes.set_xticks(range(n), [str(i) for i in range(n)], fontsize=7)
        axes.set_yticks(range(n), [_label(s, i) for i in range(n)], fontsize=7)
        axes.set_title("all tensors together", fontsize=9)
        if n <= _IN_CELLS:
            _write(axes, whole)
        if s.layers:
            each = [s.cosines(layer.tensors) for layer in s.layers]
            axes = columns[1].subplots()
            shown = _heat(axes, np.array([[c[p] for c in each] for p in pairs]), aspect="auto")
            step = -(-len(pairs) // _PAIRS)
            names = [f"{i} and {j}" for i, j in pairs]
            axes.set_yticks(range(0, len(pairs), step), names[::step], fontsize=7)
            _depth(axes, s)
            axes.set_title("layer by layer", fontsize=9)
        columns[-1].colorbar(shown, ax=axes).ax.tick_params(labelsize=7)

    text = "0 where two have nothing in common, 1 where they have one direction; grey where a "
    text += "cosine is undefined."
    height = max(2.6, 0.4 * n, 0.16 * min(_PAIRS, len(pairs))) + 0.6
    return Drawn(f"Cosines between the {s.compared}", text, height, draw)


def _heat(axes: Any, values: Array, aspect: str) -> Any:
    axes.set_facecolor("#BBBBBB")
    return axes.imshow(
        values, cmap="RdBu_r", vmin=-1, vmax=1, aspect=aspect, interpolation="nearest"
    )


def _write(axes: Any, values: Array) -> None:
    for (i, j), v in np.ndenumerate(values):
        if np.isfinite(v):
            colour = "white" if abs(v) > 0.6 else "black"
            axes.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=7, color=colour)


# ---- shares ----------------------------------------------------------------------------------


def worst_first(s: Summary) -> list[int]:
    """Tensors by the share of conflicting elements, or without one by the least cosine."""
    if s.conflict_shares is not None:
        order = np.nan_to_num(-s.conflict_shares, nan=1.0)
    else:
        order = np.nan_to_num(s.least_cosines, nan=2.0)
    return list(map(int, np.argsort(order, kind="stable")))


def _shares(s: Summary) -> Drawn:
    assert s.conflict_shares is not None
    conflicts, kept = 100 * s.conflict_shares, s.kept_shares
    worst = worst_first(s)[:_BARS]

    def draw(where: Any) -> None:
        axes = where.subplots()
        places = range(len(worst))
        axes.barh(places, conflicts[worst], color="#BBBBBB", label="conflicting signs")
        if kept is not None:
            for i in range(len(s.models)):
                colour = _style(i)["color"]
                axes.plot(100 * kept[worst, i], places, "|", markersize=9, mew=2, color=colour)
                axes.plot([], [], "|", markersize=9, mew=2, color=colour, label=f"kept of {i}")
        _names(axes, s, worst)
        axes.set_xlabel("% of the elements", fontsize=8)
        axes.set_xlim(0, 101)
        axes.grid(axis="x", alpha=0.3)
        where.legend(loc="outside upper center", ncols=5, fontsize=7)

    text = "Bars: elements where the task vectors have both signs. "
    if kept is not None:
        text = "Bars: elements where task vectors of both signs are kept. "
        text += "Marks: elements of each task vector that are kept. "
    if len(s.keys) > len(worst):
        text += f"Shown are the {len(worst)} tensors of {len(s.keys)} with the most conflicts."
    return Drawn("Kept and conflicting elements", text, 1.2 + 0.22 * len(worst), draw)


# ---- what was merged -------------------------------------------------------------------------


def _lengths(s: Summary) -> Drawn:
    groups = [layer.tensors for layer in s.layers] or [(t,) for t in range(len(s.keys))]
    each = "layer" if s.layers else "tensor"

    def draw(where: Any) -> None:
        left, right = where.subplots(1, 2)
        left.loglog(s.means, s.merged, "o", markersize=3, color=COLOURS[0], alpha=0.6)
        span = [v for v in (*s.means, *s.merged) if np.isfinite(v) and v > 0]
        if span:
            ends = [min(span), max(span)]
            left.plot(ends, ends, color="#666666", linewidth=0.8)
        left.set_xlabel("norm of the mean", fontsize=8)
        left.set_ylabel("norm of what was merged", fontsize=8)
        left.set_title("every tensor", fontsize=9)
        right.plot([_longer(s, tensors) for tensors in groups], ".-", color=COLOURS[0])
        if s.layers:
            _depth(right, s)
        right.axhline(1, color="#666666", linewidth=0.8)
        right.margins(y=0.15)
        right.set_ylim(bottom=0)
        right.set_title(f"merged / mean, {each} by {each}", fontsize=9)
        for axes in (left, right):
            axes.tick_params(labelsize=7, which="both")
            axes.grid(alpha=0.3)

    what = "result - base" if s.compared == "task vectors" else "result"
    text = f"|{what}| against the norm of the plain mean of the {s.compared}: below the line the "
    text += "merge is shorter than the mean, above it longer."
    return Drawn("What was merged against the mean", text, 3.4, draw)


def _longer(s: Summary, tensors: Sequence[int]) -> float:
    """How much longer than the mean, of these tensors together."""
    chosen = list(tensors)
    mean = float(np.sqrt(np.sum(s.means[chosen] ** 2)))
    return float(np.sqrt(np.sum(s.merged[chosen] ** 2))) / mean if mean else float("nan")
