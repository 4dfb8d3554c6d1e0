"""What a merge method is: its parameters and a recipe for one tensor."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..errors import ArgumentError
from ..keep import Keep
from .passes import Study

REQUIRED: Any = object()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    scope "model": one value per model; "tensor": one value for all models. Both may vary from
    tensor to tensor in a configuration (filters, gradients over layers).
    kind Tensor (scope "model"): a tensor of the shape of the model's; for whole models, a state
    dict each. A configuration cannot give them. Default None: the method finds a value itself.
    """

    name: str
    kind: type
    scope: str
    default: Any
    doc: str
    bounds: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()  # of a text

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def value(self, owner: str, given: Any) -> Any:
        """`given` as this parameter's type; strings as YAML leaves them ("1e-3") are read."""
        if self.kind is Tensor:
            return check.tensor(owner, given, self.name)
        if self.kind is str:
            check.choice(owner, self.name, given, self.choices)
            return given
        if self.kind is bool:
            if isinstance(given, bool) or given in (0, 1):
                return bool(given)
            raise ArgumentError.of(
                owner, f"{self.name} is no boolean", repr(given), "true or false"
            )
        if isinstance(given, bool):
            raise ArgumentError.of(owner, f"{self.name} is no number", repr(given), "a number")
        number = check.number(owner, self.name, given)
        if self.kind is int and not number.is_integer():
            raise ArgumentError.of(owner, f"{self.name} is no whole number", given, "one")
        if self.bounds and not self.bounds[0] <= number <= self.bounds[1]:
            low, high = self.bounds
            raise ArgumentError.of(
                owner, f"{self.name} is out of range", f"{number:g}", f"{low:g} to {high:g}"
            )
        return int(number) if self.kind is int else number

    def values(self, owner: str, given: Any, n: int) -> list[Any]:
        """One value per model: a single one stands for all."""
        if self.kind is Tensor:
            if not isinstance(given, Sequence):
                kinds = "a tensor per model"
                raise ArgumentError.of(
                    owner, f"{self.name} is no list", type(given).__name__, kinds
                )
        elif isinstance(given, Tensor):
            given = given.tolist()
        if not isinstance(given, Sequence) or isinstance(given, str):
            return [self.value(owner, given)] * n
        if len(given) != n:
            raise ArgumentError(
                f"{owner}: {self.name} has the wrong length; got {len(given)}; expected {n}"
            )
        return [self.value(owner, v) for v in given]


@dataclass(frozen=True)
class Inputs:
    """One tensor of every model, or a slice of it, of one shape, dtype and device."""

    xs: list[Tensor]
    base: Tensor | None
    name: str  # of the tensor: random masks are keyed by it
    seed: int
    out_dtype: torch.dtype
    backend: str
    host: str | None = None  # reproduce this tool's selection, rounding and sign rules
    models: Sequence[int] | None = None  # which of the merge's models have the tensor; None: all
    survey: Any = None  # what the method's survey, or its measure, found
    offset: int = 0  # flat index of the slice's first element in the tensor
    shape: tuple[int, ...] | None = None  # of the whole tensor; None: the xs are all of it
    order: int | None = None  # place of the tensor in the plan; None: that of the visit
    sizes: Sequence[int] | None = None  # of tensors that lie end to end in the xs; None: one tensor
    shared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # see Study

    @property
    def total(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.xs[0].shape if self.shape is None else self.shape)


# Of (arguments, shape, host).
Cut = Callable[[Mapping[str, Any], Sequence[int], str | None], str | None]
Needs = Callable[[Mapping[str, Any], Sequence[int], str | None], bool]
Joins = Callable[[Mapping[str, Any]], int]  # of arguments
Scratch = Callable[[Mapping[str, Any], Sequence[int]], int]  # of arguments and shape


def whole(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> str | None:
    """The cut of a method that needs a tensor at once."""
    return None


def anywhere(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> str | None:
    """The cut of a method that takes each element by itself."""
    return "elements"


def always(arguments: Mapping[str, Any], shape: Sequence[int], host: str | None) -> bool:
    """That a measure is needed, whatever the arguments."""
    return True


def never(arguments: Mapping[str, Any]) -> int:
    """That no tensors may be joined, empty ones neither."""
    return 0


def nothing(arguments: Mapping[str, Any], shape: Sequence[int]) -> int:
    """The scratch of a method that works in chunks."""
    return 0


def ever(arguments: Mapping[str, Any]) -> int:
    """That tensors of any size may be joined: each element is merged by itself."""
    return sys.maxsize


@dataclass(frozen=True)
class Method:
    """A recipe `merge(inputs, **parameters)` and what a caller must know to fill it.

    base "required": task vectors are taken from it. "optional": so if given. "first": if given it
    is the first model. "model": it is one model among the others.

    survey: for methods that must know the whole model before they merge its first tensor, such as
    a threshold over all tensors. It takes a `Visit`, may call it as often as it needs, and what it
    returns is `inputs.survey` in `merge`. A visitor that keeps `inputs` keeps its memory: it takes
    numbers out. `merge_tensors` surveys its one tensor. A tensor may be visited whole or slice by
    slice, by one process or by several that gather what they count.

    cut: how a tensor of that shape may be cut (see `slices`); `merge` of each slice gives what
    `merge` of the whole gives there, to the bit. measure: as survey, over the slices of one tensor;
    called for tensors of more than one, and `inputs.survey` in `merge` of each is what it returns.
    needs: whether `measure` is needed with these arguments; without, it finds None.
    draws: hosts for which it draws from torch's generator, so that what a tensor gets depends on
    those before it: such a merge is made in one go, by one process.
    joins: a number of elements; tensors of fewer may be merged end to end in one call, without a
    host, and `inputs.sizes` says where each ends. The result is what `merge` of each gives, to the
    bit. A method that surveys joins none.
    scratch: bytes that `merge` of a tensor of that shape takes beside its inputs and its result,
    where that is more than a few chunks.
    studied: the parameters on which survey or measure depend; None: all.

    kept: what `merge` keeps of each task vector, with the same inputs and arguments, for reports.
    It returns None where that cannot be told without a change to the result, as of draws from
    torch's generator. No `kept`: the method has no such rules.
    """

    name: str
    doc: str
    base: str
    models: tuple[int, int | None]  # fewest and most, a base that is subtracted not counted
    parameters: tuple[Parameter, ...]
    merge: Callable[..., Tensor]
    parity: Mapping[str, str] = field(default_factory=dict)  # host -> what equals its result
    survey: Study | None = None
    cut: Cut = whole
    measure: Study | None = None
    needs: Needs = always
    draws: frozenset[str] = frozenset()
    joins: Joins = never
    scratch: Scratch = nothing
    studied: tuple[str, ...] | None = None
    kept: Callable[..., list[Keep] | None] | None = None

    # (parameters, names of floating tensors, backend) -> parameters, once before the first tensor
    whole_models: Callable[[dict[str, Any], Sequence[str], str], dict[str, Any]] | None = None

    @property
    def tensor_valued(self) -> list[str]:
        """The parameters that are a tensor per model."""
        return [p.name for p in self.parameters if p.kind is Tensor]

    @property
    def subtracts_base(self) -> bool:
        """Whether a base stands apart from the models, rather than being one of them."""
        return self.base in ("required", "optional")

    def parameter(self, name: str) -> Parameter:
        name = name.removesuffix("_") if name == "lambda_" else name
        for p in self.parameters:
            if p.name == name:
                return p
        known = ", ".join(p.name for p in self.parameters) or "none"
        raise ArgumentError(f"{self.name}: unknown parameter; got {name!r}; expected {known}")

    def check_host(self, host: str | None) -> None:
        """Whether the method can reproduce that tool; None asks for the most accurate result."""
        if host is not None and host not in self.parity:
            known = ", ".join(self.parity) or "none: leave host out"
            raise ArgumentError(f"{self.name}: unknown host; got {host!r}; expected {known}")

    def check_count(self, n: int, base: bool) -> None:
        """Whether n models (base apart) are as many as the method takes."""
        if self.base == "required" and not base:
            raise ArgumentError(f"{self.name}: needs a base model; got none; expected one")
        count = n + (base and not self.subtracts_base)
        fewest, most = self.models
        if count < fewest or (most is not None and count > most):
            span = f"exactly {fewest}" if fewest == most else f"at least {fewest}"
            beside = " beside the base" if base and self.subtracts_base else ""
            raise ArgumentError(
                f"{self.name}: wrong number of models{beside}; got {count}; expected {span}"
            )

    def arguments(self, given: Mapping[str, Any], n: int) -> dict[str, Any]:
        """Keyword arguments of `merge` for n models, defaults filled in."""
        by_name = {self.parameter(name).name: value for name, value in given.items()}
        result: dict[str, Any] = {}
        for p in self.parameters:
            value = by_name.get(p.name, p.default)
            if value is REQUIRED:
                raise ArgumentError(f"{self.name}: parameter {p.name} is required; got none")
            key = "lambda_" if p.name == "lambda" else p.name
            if value is None and p.default is None:
                result[key] = None
                continue
            result[key] = (
                p.values(self.name, value, n) if p.scope == "model" else p.value(self.name, value)
            )
        return result
