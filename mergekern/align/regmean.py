"""regmean: models of one architecture merged by what goes into their linear layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import check
from ..errors import ArgumentError
from ..methods.chunked import rounded
from ..methods.compat import identical
from ..methods.merge import merge_state_dicts
from ..methods.regmean import (
    REGMEAN,
    Singular,
    factored,
    mean_of,
    prepared,
    shares,
    solved,
    warn_of,
)
from .batches import Batches, passes_of, reading
from .block_inputs import Captured, block_names, first_inputs, fresh, next_inputs
from .input_moments import InputMoments, Layers
from .tracing.inputs import arguments_of, require_needed
from .tracing.program import evaluating, named_tensors, unfused

_OP = "regmean"
Run = Callable[[int], None]  # everything of model i goes through it


@torch.no_grad()
def regmean(
    models: Sequence[nn.Module],
    batches: Sequence[Batches],
    *,
    weights: Sequence[float] | None = None,
    reduce: float = 1.0,
    blocks: str | Sequence[str] | None = None,
    nan: str = "error",
    memory: int | str = "4GiB",
    backend: str = "auto",
) -> nn.Module:
    """W = sum_i w_i W_i G_i (sum_i w_i G_i)^-1 of every linear layer, G_i = X_i^T X_i / n_i.

    X_i [n_i, in] are the inputs of the layer in model i over its own batches. All other tensors are
    weighted means: biases, norms, embeddings, convolutions, a linear layer whose weight something
    else holds as well. So is, with a warning, a linear layer that is never called as a module (that
    of torch's MultiheadAttention) and one whose weight is made of others (weight_norm).

    Shapes: models of one architecture; batches: for each model an iterable of what it takes, or a
    callable that returns one. Of a tuple, what is beyond the arguments that forward takes by place
    is left out (labels), and an entry after the first that would go into one with a default is
    refused: name it in a mapping, of which names that forward does not take are left out. A forward
    with *args or **kwargs takes all. Models run in eval mode, on copies of the batches, and stay as
    they are.
    weights: of the models (all 1). reduce: a factor on the G_i off their diagonals; FusionBench's
    configuration has 0.95. nan: as in `covariance`.
    blocks: RegMean++. The name of a list of modules that run one after another
    ("encoder.layers"), or the names of such modules: what goes into a block has gone through the
    merged blocks before it, within the block through model i's own layers. What lies outside the
    blocks is averaged; of blocks the first argument is the output of the one before, or its first
    entry, and the others stay.
    memory: bound on the sums, 16 in**2 + 8 out in bytes for each layer, however many models there
    are; what does not fit is done in several passes over the batches. With blocks: no bound, but
    the sums of one block and the inputs of one block for all batches.
    Result: a new model. Moments as in `Covariance.second_moment`, computed once for layers that
    read the same tensor (queries, keys, values); sums and solve as in the method "regmean", which
    takes given G_i: float64, a singular sum gets jitter and a warning with numbers.
    Cost: a forward pass of each model; n in (in + 1) flops for each distinct input, 2 out in**2 for
    each model and layer, in**3 / 3 + 2 out in**2 for each solve. With blocks also one pass of the
    merged blocks for each model's batches.
    Raises: ArgumentError for models that do not fit together, no batches, entries of a tuple that
    may be options or labels, an iterator where several passes are needed, NaN or infinities (naming
    the layer), a layer that some models call only, blocks that do not follow one another or share
    weights, weights that models[0] ties and another model does not.
    Source: RegMean (Jin et al., 2212.09849); RegMean++ (2508.03121); `RegMeanAlgorithmForCLIP` and
    `RegMeanAlgorithmForCLIPPlusPlus` of FusionBench.

    >>> a, b = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    >>> batches = [[torch.eye(2)], [torch.eye(2)]]
    >>> merged = regmean([a, b], batches)
    >>> torch.allclose(merged.weight, (a.weight + b.weight) / 2)
    True
    """
    models, batches = list(models), list(batches)
    if not models or len(batches) != len(models):
        what = "batches do not fit the models"
        raise ArgumentError.of(_OP, what, len(batches), f"one iterable for each of {len(models)}")
    weight = replace(REGMEAN.parameter("weight"), name="weights")
    share = shares(weight.values(_OP, 1.0 if weights is None else weights, len(models)))
    merged = merge_state_dicts([m.state_dict() for m in models], "linear", weight=share)
    result = copy.deepcopy(models[0])
    _require_ties(result, merged)
    result.load_state_dict(merged)
    layers = [_linear_layers(m) for m in models]
    for i, its in enumerate(layers):
        if set(its) != set(layers[0]):
            odd = sorted(set(its) ^ set(layers[0]))
            raise ArgumentError.of(_OP, f"models[{i}] has other linear layers", odd, "the same")
    sums = _Sums(
        models, share, layers, REGMEAN.parameter("reduce").value(_OP, reduce), nan, backend
    )
    if blocks is None:
        passes = _passes(result, list(layers[0]), check.parse_size("memory", memory))
        for names in passes:
            sums.merge(result, names, lambda i: _through(models[i], batches[i], len(passes)))
    else:
        _merge_blocks(result, models, batches, block_names(_OP, result, blocks), sums)
    sums.warn()
    _warn_of_computed(result)
    return result


class _Sums:
    """What linear layers are merged by."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        share: Sequence[float],
        layers: Sequence[Layers],
        reduce: float,
        nan: str,
        backend: str,
    ) -> None:
        self._states = [dict(named_tensors(m)) for m in models]
        self._share, self._layers = share, layers
        self._reduce, self._nan, self._backend = reduce, nan, backend
        self.singular: list[Singular] = []
        self.never: list[str] = []  # went a batch through them

    def merge(self, result: nn.Module, names: Sequence[str], run: Run) -> None:
        """The weights of these names into `result`, of what goes into them in `run(i)`."""
        totals: dict[tuple[str, ...], Tensor] = {}
        moved: dict[str, Tensor] = {}
        seen: dict[str, list[tuple[str, ...]]] = {name: [] for name in names}
        unit = 0.0
        for i, layers in enumerate(self._layers):
            moments = InputMoments(f"models[{i}]", self._nan, self._backend)
            with moments.watching({name: layers[name] for name in names}):
                run(i)
            unit = max(unit, moments.unit)
            for group, found in moments.groups():
                gram = prepared(found.second_moment(), self._reduce, f"inputs of {group[0]}")
                gram *= self._share[i]
                totals[group] = totals[group].add_(gram) if group in totals else gram
                for name in group:
                    seen[name].append(group)
                    away = self._states[i][name].double() - self._mean(name)
                    moved[name] = moved[name].addmm_(away, gram) if name in moved else away @ gram
        self._require_seen(seen)
        factors: dict[tuple[tuple[str, ...], ...], Tensor] = {}
        for name, sums in moved.items():
            groups = tuple(dict.fromkeys(seen[name]))
            if groups not in factors:
                total = torch.stack([totals[group] for group in groups]).sum(0)
                factors[groups], singular = factored(total, unit, name)
                self.singular += [singular] if singular else []
            merged = solved(self._mean(name), sums, factors[groups])
            weight = result.get_parameter(name)
            weight.copy_(rounded(_OP, merged, weight.dtype, "torch"))

    def _mean(self, name: str) -> Tensor:
        return mean_of([state[name] for state in self._states], self._share)

    def _require_seen(self, seen: Mapping[str, Sequence[object]]) -> None:
        count = len(self._states)
        for name, groups in seen.items():
            if 0 < len(groups) < count:
                what = f"{name} is called in some models only"
                raise ArgumentError.of(_OP, what, f"{len(groups)} of {count}", "all or none")
        self.never += [name for name, groups in seen.items() if not groups]

    def warn(self) -> None:
        """What is not as one would expect, in a sentence each."""
        warn_of(self.singular, stacklevel=4)
        if self.never:
            warnings.warn(
                f"regmean: linear layers that no batch went through are averaged; got "
                f"{', '.join(self.never)}; expected calls of each as a module",
                stacklevel=4,
            )


def _require_ties(model: nn.Module, merged: Mapping[str, Any]) -> None:
    """What is one tensor in the model has one value."""
    names: dict[int, str] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        first = names.setdefault(id(x), name)
        if isinstance(x, Tensor) and not identical(merged[first], merged[name]):
            what = f"models[0] ties {first} and {name}"
            raise ArgumentError.of(_OP, what, "another model with two tensors", "the same in all")


def _warn_of_computed(model: nn.Module) -> None:
    computed = [
        name or "the model"
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "weight" not in dict(m.named_parameters(recurse=False))
    ]
    if computed:
        warnings.warn(
            f"regmean: linear layers whose weights are made of other tensors are averaged by "
            f"these; got {', '.join(computed)}; expected weights that are parameters",
            stacklevel=4,
        )


def _linear_layers(model: nn.Module) -> dict[str, list[nn.Linear]]:
    """The weights that linear layers hold, and nothing else does, with these layers."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for name, x in module.named_parameters(prefix, recurse=False):
            holders.setdefault(id(x), []).append((name, module))
    found = {}
    for held in holders.values():
        linear = [m for name, m in held if isinstance(m, nn.Linear) and m.weight.ndim == 2]
        if held[0][0].rpartition(".")[2] == "weight" and len(linear) == len(held):
            found[held[0][0]] = linear
    return found


def _passes(model: nn.Module, names: Sequence[str], limit: int) -> list[list[str]]:
    """The layers in order, as many in each pass as fit."""
    sizes = {}
    for name in names:
        out, into = model.get_parameter(name).shape
        sizes[name] = size = 8 * (2 * into + out) * into
        if size > limit:
            raise ArgumentError.of(_OP, f"{name} does not fit memory", limit, f"{size} or more")
    return passes_of(sizes, limit)


def _through(model: nn.Module, batches: Batches, passes: int = 1) -> None:
    """All batches through a model."""
    with evaluating(model), unfused():
        for args, kwargs in _calls(model, batches, passes):
            model(*args, **kwargs)


def _calls(
    model: nn.Module, batches: Batches, passes: int = 1
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every batch as the arguments of a call; there has to be one."""
    empty = True
    for batch in reading(_OP, batches, passes):
        empty = False
        require_needed(_OP, model, batch)
        yield fresh(arguments_of(_OP, model, batch))
    if empty:
        raise ArgumentError.of(_OP, "a model has no batches", "none", "at least one")


def _merge_blocks(
    result: nn.Module,
    models: Sequence[nn.Module],
    batches: Sequence[Batches],
    blocks: Sequence[str],
    sums: _Sums,
) -> None:
    """Block by block, with what the merged blocks before it have made of each model's batches."""
    with evaluating(result), unfused():
        inputs: list[list[Captured]] = [
            first_inputs(_OP, result, blocks, _calls(result, each)) for each in batches
        ]
    layers = _linear_layers(result)
    _require_apart(result, blocks, layers)
    for k, name in enumerate(blocks):
        its = [weight for weight in layers if weight.startswith(f"{name}.")]
        sums.merge(result, its, partial(_through_block, models, name, inputs))
        if k + 1 < len(blocks):
            merged = result.get_submodule(name)
            with evaluating(merged), unfused():
                inputs = [[next_inputs(merged, c) for c in each] for each in inputs]


def _require_apart(model: nn.Module, blocks: Sequence[str], layers: Mapping[str, Any]) -> None:
    """A weight of a block is in no other block and nowhere else."""
    held: dict[int, set[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        block = next((b for b in blocks if f"{prefix}.".startswith(f"{b}.")), "no block")
        for x in module.parameters(recurse=False):
            held.setdefault(id(x), set()).add(block)
    for name in layers:
        its = held[id(model.get_parameter(name))]
        if len(its) > 1:
            raise ArgumentError.of(_OP, f"{name} is shared", sorted(its), "a weight of one block")


def _through_block(
    models: Sequence[nn.Module], name: str, inputs: Sequence[Sequence[Captured]], i: int
) -> None:
    """Model i's inputs through its own block."""
    block = models[i].get_submodule(name)
    with evaluating(block), unfused():
        for captured in inputs[i]:
            args, kwargs = fresh(captured)
            block(*args, **kwargs)
