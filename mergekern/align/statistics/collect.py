"""collect_statistics: batches through several models at once, into accumulators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ... import check
from ...errors import ArgumentError
from ...ops.covariance import Covariance
from ..batches import Batches, passes_of, reading
from ..models import fingerprints, spaces_fingerprint, states_of
from ..spaces import Spaces
from .collector import Collector, Mask
from .group import Group
from .statistics import Moments, Statistics, Stored, accumulator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OP = "collect_statistics"


def collect_statistics(
    models: Sequence[nn.Module],
    batches: Batches,
    spaces: Spaces,
    *,
    within: bool = True,
    probes: str = "last",
    mask: Mask | None = None,
    nan: str = "error",
    memory: int | str = "4GiB",
    progress: bool = False,
    backend: str = "auto",
    group: ProcessGroup | None = None,
) -> Statistics:
    """C[i, j] of the features i, j of all models, for every movable space, over the same inputs.

    Each batch goes through all models side by side, call by call; what a probe reads is added to
    the space's `Covariance` at once, so activations are never stored. Beside these, what REPAIR
    needs: the mean and variance of what every convolution and linear layer with a bias returns that
    makes features of a movable space. Networks with BatchNorm need none: `repair` resets it.

    Shapes: models of one architecture, that of `spaces`; they compute as in eval mode. batches: an
    iterable of what the example inputs of `discover_spaces` are, or a callable that returns one:
    tensors, tuples of arguments, mappings of named ones. Entries beyond those of the example
    (labels, in a DataLoader's pairs) are left out.
    within: also between features of one model, which method="zip" needs. Without it only those of
    model 0 with all others: for two models a third of the FLOPs.
    probes: "last", the last place where a space is read (of heads: all), or "all" of them, as more
    rows.
    mask: rows that do not count (padding): the name of an input, nonzero where tokens are, or a
    callable from a batch to bool [batch, tokens].
    nan: as in `covariance`; "zero" as ZipIt.
    memory: bound on the accumulators, 8 (N size)**2 bytes for a space of N models. What does not
    fit at once is done in several passes over `batches`; those that are done go to a temporary
    folder (TMPDIR), from which they are read as they are needed.
    group: of torch.distributed (gloo, nccl), such as `torch.distributed.group.WORLD`: each process
    brings batches of its own, and all get what one process gets of all batches. Each calls this
    with the same models, spaces and options; one of them may have no batches.
    Result: counts, means and covariances as `Covariance` of the activations, one after another; of
    a group merged in the order of ranks, within the same bound, the same bits in every process.
    Cost: for each pass a forward pass of each model; n d (d + 1) flops for n rows of d = N size.
    Memory: the accumulators, and for each model the values of its forward pass that are still to be
    used. A group passes each accumulator log2(processes) + 1 times, with one more in memory.
    Raises: ArgumentError for no batches, an iterator where several passes are needed, models that
    differ from the spaces' (in names or shapes, or in what they return for two rows), inputs
    on another device, NaN or infinities (naming model and module), a space that does not fit,
    another process of the group that failed or was given other models.
    Source: ZipIt (2305.03053); the outputs for REPAIR (2211.08403).

    >>> import torch
    >>> from mergekern.align.tracing.program import Program
    >>> from mergekern.align.spaces import Place, Probe, Space, Spaces
    >>> models = [torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(2, 1))] * 2
    >>> features = torch.arange(2)[:, None]
    >>> places = [Place("0.weight", 0, features, "produces")]
    >>> probe = Probe("linear_1", 0, (1,), features, "1")
    >>> program = Program(models[0], torch.zeros(2, 4), "example")
    >>> spaces = Spaces([Space("hidden", 2, tuple(places), (probe,))], program)
    >>> found = collect_statistics(models, [torch.randn(8, 4)], spaces)
    >>> found.count("hidden"), found.correlation("hidden").shape
    (8, torch.Size([4, 4]))
    """
    check.choice(_OP, "probes", probes, ("last", "all"))
    models = list(models)
    if len(models) < 2:
        raise ArgumentError.of(_OP, "there is nothing to compare", len(models), "2 models or more")
    program = spaces.program
    states = states_of(_OP, models, spaces.architecture)
    options = {"nan": nan, "backend": backend, "device": next(iter(states[0].values())).device}
    passes = _passes(spaces, len(models), within, check.parse_size("memory", memory))
    seen, together = fingerprints(models), Group(_OP, group)
    together.require_same(
        models=" ".join(seen),
        spaces=spaces_fingerprint(spaces),
        options=f"within={within}, passes {passes}",
    )
    collector = Collector(models, states, program, within, mask, options)
    stored = Stored(spaces, len(models), within)
    covariances: dict[str, Covariance] = {}
    outputs: dict[str, list[Covariance]] = {}
    for round_, names in enumerate(passes):
        covariances = {n: accumulator(spaces[n], len(models), within, **options) for n in names}
        before = collector.readings([spaces[n] for n in names], covariances, probes == "all")
        after = {} if round_ else collector.glances(spaces, outputs)
        with together.all_or_none():
            count = 0
            for batch in _again(batches, round_, len(passes), progress):
                collector.add(batch, before, after)
                count += 1
        _share(together, count, [*covariances.values(), *(c for n in after for c in outputs[n])])
        if len(passes) > 1:
            stored.put(covariances)
            before.clear()  # it refers to the accumulators, which give way to the next ones
            covariances.clear()
    return Statistics(
        spaces,
        seen,
        within,
        covariances or stored,
        {
            node: [Moments(c.count, c.mean_x, c.variance_x) for c in each]
            for node, each in outputs.items()
        },
    )


def _passes(spaces: Spaces, models: int, within: bool, limit: int) -> list[list[str]]:
    """The movable spaces in order, as many in each pass as fit."""
    sizes = {}
    for name, space in spaces.movable.items():
        if not space.probes:
            what = f"space {name} is read nowhere"
            raise ArgumentError.of(_OP, what, "no probe", "at least one, or method='weights'")
        sizes[name] = size = 8 * space.size**2 * (models**2 if within else models - 1)
        if size > limit:
            what = f"space {name} of {space.size} features in {models} models does not fit memory"
            raise ArgumentError.of(_OP, what, limit, f"{size} bytes or more")
    return passes_of(sizes, limit)


def _share(together: Group, count: int, found: list[Covariance]) -> None:
    """What all processes have seen, in each of them; there has to be a batch."""
    if not any(together.gather(count)):
        expected = "at least one, and an iterator that was not read before"
        raise ArgumentError.of(_OP, "there are no batches", "none", expected)
    for each in found:
        together.merge(each)


def _again(batches: Batches, round_: int, rounds: int, progress: bool) -> Iterable[Any]:
    """The batches once more."""
    source = reading(_OP, batches, rounds)
    if not progress:
        return source
    from rich.console import Console
    from rich.progress import track

    text = f"statistics, pass {round_ + 1} of {rounds}"
    return track(source, text, console=Console(stderr=True))
