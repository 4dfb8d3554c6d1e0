"""greedy_soup: the mean of those models that do not make it worse."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import check
from ..errors import ArgumentError, CheckpointError
from ..ops.weighted_sum import weighted_sum
from .compat import require_fit
from .merge import common_dtype

_OP = "greedy_soup"
Model = Mapping[str, Any] | str | os.PathLike[str]


class Soup(NamedTuple):
    """What greedy_soup found: the mean, the numbers of its models in the order in which they
    joined, its score; the score of each model alone, if the order was not given; and of each mean
    that was tried, in order: of the first model, then with the second, and so on."""

    state_dict: dict[str, Tensor]
    members: tuple[int, ...]
    score: float
    scores: tuple[float, ...]
    trials: tuple[float, ...]


def greedy_soup(
    models: Sequence[Model],
    score: Callable[[dict[str, Tensor]], float],
    *,
    order: Sequence[int] | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Soup:
    """mean of S, to which model i is added if score(mean of S + i) >= score(mean of S).

    models: state dicts, any mappings that load a tensor when it is asked for, or paths of
    safetensors files, of which a tensor is read when its turn comes. score: a number of a state
    dict, higher is better, such as accuracy on held-out data. It is always given the same tensors,
    in which the next mean is written: who keeps one copies it.
    order: numbers of models, from the first to be tried on; by default all, by their own score,
    of equal ones the first. out_dtype: of the means; by default what `torch` promotes to.

    Result: every mean is that of the models themselves, never of rounded means: the bits of
    `merge_state_dicts` by "linear" with equal weights, models by number. Buffers of integers,
    booleans and eight-bit floats must be equal in all models.
    Cost: 2 N - 1 scores (N with an order); a mean of k models reads these and writes one. Memory
    for one state dict beside the models.
    Raises: ArgumentError for no models, models that do not fit, an order that is none, a score
    that is no number or NaN; CheckpointError for files that cannot be read.
    Source: recipe 1 of Model Soups (Wortsman et al., 2203.05482), whose rule is >=; the authors'
    script has > and averages rounded averages.

    >>> import torch
    >>> models = [{"w": torch.tensor([v])} for v in (1.0, 9.0, 4.0)]
    >>> soup = greedy_soup(models, lambda d: -abs(d["w"].item() - 2))
    >>> soup.members, soup.state_dict
    ((0, 2), {'w': tensor([2.5000])})
    """
    if isinstance(models, Mapping | str) or not isinstance(models, Sequence):
        got = type(models).__name__
        raise ArgumentError.of(_OP, "models is no list", got, "a sequence of state dicts or paths")
    if not models:
        raise ArgumentError.of(_OP, "models is empty", "no model", "at least one")
    opened = [_opened(f"models[{i}]", model) for i, model in enumerate(models)]
    require_fit(_OP, {model.label: model for model in opened})
    mean = _Mean(opened, out_dtype, backend)

    def scored(members: Sequence[int]) -> float:
        value = check.number(
            _OP, f"the score of {list(members)}", score(mean(members)), finite=False
        )
        if math.isnan(value):
            what = f"the score of {list(members)} is NaN"
            raise ArgumentError.of(_OP, what, value, "a number, higher is better")
        return value

    scores = [] if order is not None else [scored([i]) for i in range(len(models))]
    turns = sorted(range(len(scores)), key=lambda i: -scores[i]) if order is None else list(order)
    if not turns or not set(turns) <= set(range(len(models))) or len(set(turns)) < len(turns):
        raise ArgumentError.of(
            _OP, "order is none", turns, f"different numbers below {len(models)}, at least one"
        )
    members = turns[:1]
    trials = [scores[members[0]] if scores else scored(members)]
    best = trials[0]
    for i in turns[1:]:
        trials.append(scored([*members, i]))
        if trials[-1] >= best:
            members.append(i)
            best = trials[-1]
    return Soup(mean(members), tuple(members), best, tuple(scores), tuple(trials))


class _Model(Mapping[str, Tensor]):
    """Tensors that are read, and checked, when they are asked for."""

    def __init__(self, label: str, keys: Sequence[str], read: Callable[[str], Any]) -> None:
        self.label, self._keys, self._read = label, dict.fromkeys(keys), read

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return check.tensor(_OP, self._read(key), f"{self.label}[{key!r}]", floating=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _opened(label: str, model: Model) -> _Model:
    if isinstance(model, Mapping):
        return _Model(label, list(model), model.__getitem__)
    try:
        file = safe_open(os.fspath(model), framework="pt")
    except (OSError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{_OP}: {label} is no model; got {model!r} ({error}); expected a state dict or the "
            "path of a safetensors file"
        ) from None
    keys = file.keys()  # type: ignore[no-untyped-call]
    return _Model(label, list(keys), file.get_tensor)


class _Mean:
    """The mean of some models, always in the same tensors."""

    def __init__(
        self, models: Sequence[_Model], out_dtype: torch.dtype | None, backend: str
    ) -> None:
        self._models, self._backend = models, backend
        self._dtypes: dict[str, torch.dtype] = {}  # of the arithmetic: no matter who takes part
        self._out: dict[str, Tensor] = {}
        for key, x in models[0].items():
            dtype = x.dtype
            if x.dtype in check.FLOATS:
                self._dtypes[key] = common_dtype([model[key].dtype for model in models])
                dtype = check.result_dtype(_OP, out_dtype or self._dtypes[key], None, x)
            self._out[key] = torch.empty(x.shape, dtype=dtype, device=x.device)

    def __call__(self, members: Sequence[int]) -> dict[str, Tensor]:
        chosen = [self._models[i] for i in sorted(members)]
        for key, out in self._out.items():
            if key not in self._dtypes:
                out.copy_(chosen[0][key])
                continue
            xs = [model[key].to(self._dtypes[key]) for model in chosen]
            weighted_sum(xs, [1.0] * len(xs), normalize=True, out=out, backend=self._backend)
        return dict(self._out)
