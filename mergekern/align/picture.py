"""draw: a match as a picture, correlations by space and by depth."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from .matching.match import Match
from .statistics.statistics import Statistics

_OP = "picture"
_SHOWN = 64  # features of a heat map: with more of them the diagonal would be thinner than a pixel
_NAMES = 16  # names on an axis that can be told apart
_BEFORE, _AFTER, _WITHIN = "#0072B2", "#D55E00", "#999999"  # of Okabe and Ito, for all eyes


def require_matplotlib(op: str = _OP) -> None:
    """Raises ArgumentError where there is none."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise  # matplotlib is there but broken: its own message says more than ours
        expected = "pip install 'mergekern[picture]', or no picture"
        raise ArgumentError.of(op, "matplotlib is not installed", "none", expected) from None


def draw(
    stats: Statistics, match: Match, path: str | PathLike[str], *, until: str | None = None
) -> None:
    """Correlations of model 0 with model 1 before and after the match, and what was merged where.

    Above: of the first, the middle and the last space, the correlations of the features of model 0
    (rows) with those of model 1 (columns), as they stand and in the order of the merged features
    that they go to; where there are more than 64, those of the first 64 places. Matched features
    lie on the diagonal. Below: for all spaces by depth, the mean correlation of features in the
    same place and of those that are merged (`Fit`), and the share of features that are merged into
    another of their own model.

    until: a line is drawn behind this space.
    Result: a file in the format that the suffix of `path` names.
    Raises: ArgumentError if matplotlib is missing, and for a match without correlations.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    names = [name for name in match.spaces.movable if name in match.correlations]
    if not names:
        expected = "a match of statistics, with spaces that move"
        raise ArgumentError.of(_OP, "there are no correlations", match.method, expected)
    chosen = list(dict.fromkeys(names[i] for i in (0, len(names) // 2, -1)))
    figure = Figure(figsize=(11, 12), layout="constrained", dpi=120)
    above, below = figure.subfigures(2, 1, height_ratios=(5, 4), squeeze=False)[:, 0]
    maps = above.subplots(2, len(chosen), squeeze=False)
    for axes, name in zip(maps.T, chosen):
        block = stats.between(stats.correlation(name), 1)
        shown = _heat(axes[0], block[:_SHOWN, :_SHOWN], f"{_short(name)}\nbefore")
        _heat(axes[1], _matched(block, match.labels[name]), "after")
    bar = above.colorbar(shown, ax=maps, shrink=0.7)
    bar.set_label("correlation")
    above.suptitle(f"Features of model 0 and model 1 ({match.method})")
    _by_depth(below.subplots(1, 2), match, names, until)
    figure.savefig(path)


def _matched(block: Tensor, labels: list[Tensor]) -> Tensor:
    """Rows and columns in the order of the merged features that they go to, the first of them."""
    rows, columns = (
        own.argsort(stable=True)[: int((own < _SHOWN).sum())].to(block.device) for own in labels[:2]
    )
    return block[rows][:, columns]


def _heat(axes: Any, block: Tensor, title: str) -> Any:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("feature of model 1")
    axes.set_ylabel("feature of model 0")
    return axes.imshow(
        block.cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
    )


def _by_depth(axes: Any, match: Match, names: list[str], until: str | None) -> None:
    depth = range(len(names))
    fits = [match.correlations[name] for name in names]
    left, right = axes
    left.plot(depth, [f.before for f in fits], "o--", color=_BEFORE, label="same place (before)")
    left.plot(depth, [f.after for f in fits], "s-", color=_AFTER, label="merged (after)")
    left.set_ylabel("mean correlation")
    left.set_ylim(min(0, *(f.before for f in fits)) - 0.05, 1.05)
    right.bar(depth, [100 * f.merged_within for f in fits], color=_WITHIN)
    right.set_ylabel("merged within a model (%)")
    right.set_ylim(0, max(1.0, *(110 * f.merged_within for f in fits)))
    step = -(-len(names) // _NAMES)
    for each in axes:
        each.set_xticks(depth[::step], [_short(n) for n in names[::step]], rotation=90, fontsize=8)
        each.set_xlabel("space, by depth")
        each.grid(alpha=0.3)
        if until in names:
            each.axvline(names.index(until) + 0.5, color="black", linestyle=":", label="until")
    left.legend(loc="best", fontsize=8)


def _short(name: str, longest: int = 24) -> str:
    """The end of a name, which tells the layers of a network apart."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
