"""merge_tensors and merge_state_dicts: a method by name, over tensors and over whole models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from ..ops.permute import end_to_end
from . import REGISTRY
from .compat import Signature, require_fit
from .registry import Inputs, Method

# From so many elements on tensors go alone: a call takes 20 to 35 us, and at 2**16 elements the
# copies to and from a buffer take as long.
_JOINED = 1 << 14
# Elements of a buffer on the CPU, whose memory the allocator then has at hand: 600 tensors of 3,072
# elements took 4.9 ms so, and 13.0 ms in one buffer, of page faults.
_BUFFER = 1 << 17


def method_named(name: str) -> Method:
    if name not in REGISTRY:
        raise ArgumentError(
            f"merge: unknown method; got {name!r}; expected one of {', '.join(sorted(REGISTRY))}"
        )
    return REGISTRY[name]


def merge_tensors(
    tensors: Sequence[Tensor],
    method: str,
    *,
    base: Tensor | None = None,
    name: str = "",
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    host: str | None = None,
    **parameters: Any,
) -> Tensor:
    """One merged tensor, by the method of that name (see `methods()`).

    Shapes: all of one shape. Dtypes: floating; mixed ones are promoted, as torch promotes.
    Parameters: those of the method, by mergekit's names (`lambda_` for lambda); one value, or for
    per-model ones a list in the order of `tensors` (a base that counts as a model comes first).
    host: reproduce that tool's selection, rounding and sign rules (`methods()[m].parity` says how
    far); None gives the most accurate result.
    name, seed: key of random masks. out_dtype: the result is rounded once, to this.

    Result: see the ops the method is made of; inputs are never rounded before the arithmetic.
    Raises: ArgumentError for unknown methods and parameters, wrong counts, unequal shapes.
    Source: mergekit `merge_tensors`.

    >>> import torch
    >>> merge_tensors([torch.zeros(2), torch.ones(2)], "linear", weight=[1, 3])
    tensor([0.7500, 0.7500])
    """
    spec = method_named(method)
    spec.check_host(host)
    inputs = _inputs(spec, tensors, base, name, seed, out_dtype, backend, host)
    arguments = spec.arguments(parameters, len(inputs.xs))
    if spec.survey is not None:
        inputs = replace(inputs, survey=spec.survey(lambda visitor: visitor(inputs, **arguments)))
    return spec.merge(inputs, **arguments)


def _inputs(
    spec: Method,
    tensors: Sequence[Tensor],
    base: Tensor | None,
    name: str,
    seed: int,
    out_dtype: torch.dtype | None,
    backend: str,
    host: str | None,
) -> Inputs:
    """Checked tensors of one dtype, the base in its place."""
    xs = [check.tensor(spec.name, x, f"tensors[{i}]") for i, x in enumerate(tensors)]
    if base is not None:
        base = check.tensor(spec.name, base, "base")
    spec.check_count(len(xs), base is not None)
    if base is not None and not spec.subtracts_base:
        xs, base = [base, *xs], None
    dtype = common_dtype([x.dtype for x in xs] + ([] if base is None else [base.dtype]))
    return Inputs(
        xs=[x.to(dtype) for x in xs],
        base=None if base is None else base.to(dtype),
        name=name,
        seed=seed,
        out_dtype=dtype if out_dtype is None else out_dtype,
        backend=backend,
        host=host,
    )


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest type that holds all of these, as torch promotes."""
    return functools.reduce(torch.promote_types, dtypes)


def merge_state_dicts(
    state_dicts: Sequence[Mapping[str, Any]],
    method: str,
    *,
    base: Mapping[str, Any] | None = None,
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    host: str | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """A merged state dict: every floating tensor by `merge_tensors`, the rest copied.

    state_dicts, base: names to tensors, numpy arrays or any DLPack producers (jax, cupy).
    Buffers of integers, booleans and eight-bit floats must be equal in all models. A tensor
    that is missing somewhere, has another shape or another class of dtype is an error that lists
    all of them: nothing is dropped or guessed.

    Small tensors are merged in one call where their elements need nothing else of their tensor, or
    only ranks; these lie end to end in one buffer then, with the bits they would have alone.
    Parameters: as in `merge_tensors`, the same for all tensors; of those that are a tensor per
    model (`fisher`, `gram`), a state dict per model with exactly the tensors that have one.
    Raises: ArgumentError.

    >>> import torch
    >>> a, b = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    >>> merge_state_dicts([a, b], "linear", weight=1)
    {'w': tensor([0.5000])}
    """
    given = {} if base is None else {"base": base}
    given.update({f"state_dicts[{i}]": d for i, d in enumerate(state_dicts)})
    models = {label: _tensors(label, d) for label, d in given.items()}
    if not models:
        raise ArgumentError("merge_state_dicts: no state dicts; expected at least one")
    spec = method_named(method)
    spec.check_host(host)
    spec.check_count(len(state_dicts), base is not None)
    n = len(models) - (base is not None and spec.subtracts_base)
    require_fit("merge_state_dicts", models)
    first = next(iter(models.values()))
    floating = [key for key, x in first.items() if x.dtype in check.FLOATS]
    _require_tensors(spec, parameters, {key: first[key] for key in floating}, n)
    if floating or not spec.tensor_valued:
        spec.arguments(_of_tensor(spec, parameters, next(iter(floating), "")), n)
    if floating and spec.whole_models:
        parameters = spec.whole_models(parameters, floating, backend)

    def inputs_of(key: str, tensors: list[Tensor]) -> Inputs:
        its_base, xs = (tensors[0], tensors[1:]) if base is not None else (None, tensors)
        return _inputs(spec, xs, its_base, key, seed, out_dtype, backend, host)

    def arguments_of(key: str) -> dict[str, Any]:
        return spec.arguments(_of_tensor(spec, parameters, key), n)

    def visit(visitor: Callable[..., None]) -> None:
        for key in floating:
            visitor(inputs_of(key, [d[key] for d in models.values()]), **arguments_of(key))

    survey = None if spec.survey is None else spec.survey(visit)
    limit = 0
    if floating and host is None:
        limit = min(_JOINED, spec.joins(arguments_of(floating[0])))
    merged: dict[str, Tensor] = {}
    small: dict[tuple[Any, ...], list[str]] = {}
    for key in floating:
        tensors = [d[key] for d in models.values()]
        x = tensors[0]
        if x.numel() < limit and all(y.device == x.device for y in tensors):
            small.setdefault((x.device, *(y.dtype for y in tensors)), []).append(key)
        else:
            alone = replace(inputs_of(key, tensors), survey=survey)
            merged[key] = spec.merge(alone, **arguments_of(key))
    for keys in _buffers(small, {key: x.numel() for key, x in first.items()}):
        sizes = [first[key].numel() for key in keys]
        buffers = end_to_end([[d[key] for key in keys] for d in models.values()], backend)
        joined = replace(inputs_of(keys[0], buffers), sizes=sizes)
        # Whose arguments are the same: those with tensors among them do not join.
        parts = torch.split(spec.merge(joined, **arguments_of(keys[0])), sizes)
        views = (part.view(first[key].shape) for key, part in zip(keys, parts, strict=True))
        merged.update(zip(keys, views, strict=True))
    return {key: merged[key] if key in merged else x.clone() for key, x in first.items()}


def _buffers(
    small: Mapping[tuple[Any, ...], list[str]], sizes: Mapping[str, int]
) -> Iterator[list[str]]:
    """The tensors of each buffer: on a GPU, where launches count, as many as fit together."""
    for (device, *_), keys in small.items():
        taken: list[str] = []
        elements = 0
        for key in keys:
            elements += sizes[key]
            if taken and elements > _BUFFER and device.type == "cpu":
                yield taken
                taken, elements = [], sizes[key]
            taken.append(key)
        yield taken


def _tensors(label: str, state_dict: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, whatever holds them."""
    if not isinstance(state_dict, Mapping):
        got = type(state_dict).__name__
        what = f"{label} is no mapping"
        raise ArgumentError.of("merge_state_dicts", what, got, "names to tensors (a state dict)")
    return {
        key: check.tensor("merge_state_dicts", x, f"{label}[{key!r}]", floating=False)
        for key, x in state_dict.items()
    }


def _require_tensors(
    spec: Method, parameters: Mapping[str, Any], like: Mapping[str, Tensor], n: int
) -> None:
    """Whether the parameters that are tensors hold n state dicts that fit the tensors `like`."""
    for name in spec.tensor_valued:
        given = parameters.get(name)
        if (
            not isinstance(given, Sequence)
            or len(given) != n
            or not all(isinstance(d, Mapping) for d in given)
        ):
            got = f"{len(given)} values" if isinstance(given, Sequence) else type(given).__name__
            raise ArgumentError.of(spec.name, f"{name} does not fit", got, f"{n} state dicts")
        p = spec.parameter(name)
        shapes = {key: p.beside(x.shape) for key, x in like.items()}
        expected = {
            key: Signature(like[key].dtype, tuple(shape))
            for key, shape in shapes.items()
            if shape is not None and not (p.optional and all(d.get(key, 0) is None for d in given))
        }
        for key in (key for d in given for key, x in d.items() if x is None):
            if not p.optional or shapes.get(key) is None:
                what = f"{name} of {key} is no tensor"
                raise ArgumentError.of(spec.name, what, None, "a tensor, or no such key")
        labels = {
            f"{name}[{i}]": {key: x for key, x in d.items() if x is not None}
            for i, d in enumerate(given)
        }
        require_fit("merge_state_dicts", {"state_dicts": expected, **labels})


def _of_tensor(spec: Method, parameters: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The parameters for the tensor of that name; those that are tensors where it has some."""
    tensors = spec.tensor_valued
    return {
        name: [d[key] for d in value] if name in tensors else value
        for name, value in parameters.items()
        if name not in tensors or key in value[0]
    }
