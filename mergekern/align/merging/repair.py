"""repair: statistics of features that merging has changed, measured and put right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ..batches import Batches
from ..layers import norms_of
from ..matching.match import Match
from ..statistics.statistics import Statistics
from ..tracing.inputs import Arguments, Inputs, arguments_of
from ..tracing.program import evaluating
from .partial import PartialZip, running_statistics, train_norms
from .rescale import rescale

_OP = "repair"


@torch.no_grad()
def repair(
    module: nn.Module,
    batches: Batches,
    *,
    match: Match | None = None,
    statistics: Statistics | None = None,
    weights: Sequence[float] | None = None,
) -> None:
    """Gives the features of a merged model the scale that they had, in place, by one pass.

    Averaged features vary less than what they are averages of. Networks with BatchNorm: running
    means and variances are measured anew, as the plain average over the batches. Networks without:
    REPAIR. Every convolution and linear layer that makes features that move, and has a bias, is
    scaled, a row (w, b) to (s w / v, s (b - m) / v + t): m and v are mean and standard deviation of
    its output in the merged model, t and s the averages of those in the models, over the features
    that were merged. Layers are taken in order, each with the repaired ones before it.

    module: what `apply` returned, a PartialZip too: heads are repaired as well, by the statistics
    of their own model. batches: as for `collect_statistics`; entries beyond those that the model
    takes are left out. match, statistics: what the module was made by, for REPAIR. weights: of the
    models, as in `apply`.
    Result: BatchNorm: the numbers of momentum=None in training mode, everything else in eval mode.
    REPAIR: moments in float64, of all batches (Chan); a later layer sees each batch normalised by
    itself, so for several batches its mean and deviation are near s and t, for one they are t and s
    within rounding. A feature that does not vary is shifted only. Layers without bias, tied ones
    and such as are called twice stay. Nothing changes if the pass is interrupted.
    Cost: one forward pass.
    Raises: ArgumentError for no batches, a network without BatchNorm and no statistics, activations
    that are not finite.
    Source: REPAIR (Jordan et al., 2211.08403); `reset_bn_stats` of ZipIt (2305.03053).

    >>> import torch
    >>> norm = torch.nn.BatchNorm1d(1).eval()
    >>> repair(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [4.0]])])
    >>> norm.running_mean, norm.running_var
    (tensor([3.]), tensor([1.]))
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError.of(_OP, "module is none", type(module).__name__, "a torch.nn.Module")
    if isinstance(module, PartialZip) and running_statistics(module):
        _reset_partial(module, _flat(module.parts.inputs, batches))
    elif has_norms(module):
        _reset(module, _taken(module, match, batches))
    elif match is None or statistics is None:
        what = "a network without BatchNorm needs what it was made by"
        raise ArgumentError.of(_OP, what, "none", "match and statistics")
    else:
        inputs = _flat(match.spaces.program.inputs, batches)
        rescale(_OP, module, inputs, match, statistics, weights)


def has_norms(module: nn.Module) -> bool:
    """Whether any BatchNorm has statistics to reset."""
    if isinstance(module, PartialZip):
        return bool(running_statistics(module))
    return bool(norms_of(module))


def _reset(module: nn.Module, inputs: Iterable[Arguments]) -> None:
    """By the modules themselves."""
    norms = norms_of(module)
    momenta = [norm.momentum for norm in norms]
    with _kept([x for norm in norms for x in norm.buffers(recurse=False)]), evaluating(module):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain average
                norm.training = True
            for args, kwargs in inputs:
                module(*args, **kwargs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _reset_partial(module: PartialZip, inputs: Iterable[Sequence[Any]]) -> None:
    """By the calls of the program, as the modules would."""
    norms = running_statistics(module)
    calls = [train_norms({})] * (1 + len(module.heads))
    with _kept([x for pair in norms for x in pair]):
        for mean, variance in norms:
            mean.zero_()
            variance.fill_(1)
        for flat in inputs:
            module.run(flat, calls)


def _taken(module: nn.Module, match: Match | None, batches: Batches) -> Iterator[Arguments]:
    for batch in _all(batches):
        if match is None:
            yield arguments_of(_OP, module, batch)
        else:
            yield match.spaces.program.inputs.of_batch(_OP, batch)


def _flat(inputs: Inputs, batches: Batches) -> Iterator[list[Any]]:
    return (inputs.flatten(_OP, *inputs.of_batch(_OP, batch)) for batch in _all(batches))


def _all(batches: Batches) -> Iterator[Any]:
    empty = True
    for batch in batches() if callable(batches) else batches:
        empty = False
        yield batch
    if empty:
        expected = "at least one, and an iterator that was not read before"
        raise ArgumentError.of(_OP, "there are no batches", "none", expected)


@contextmanager
def _kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """They get their numbers back if the block does not end."""
    saved = [x.clone() for x in tensors]
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            for x, before in zip(tensors, saved, strict=True):
                x.copy_(before)
