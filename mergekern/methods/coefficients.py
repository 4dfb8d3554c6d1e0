"""MergedModel: a network whose weights are a merge, differentiable by the merge's coefficients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .. import check
from ..errors import ArgumentError
from ..ops.coefficient_gradients import coefficient_gradients
from ..ops.merge_deltas import merge_deltas
from .compat import Signature, identical, require_fit

_OP = "MergedModel"
LAYERS: dict[str, Callable[[str], str]] = {"tensor": lambda name: name, "model": lambda name: ""}


# Both functions keep what they need in `ctx` itself and save nothing through it: autograd frees
# what is saved, so that two losses of one merge could not be differentiated one after the other.


class _Constrained(torch.autograd.Function):
    """constraint(coefficients)."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, constraint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.at, ctx.constraint = coefficients.detach().clone(), constraint
        return constraint(coefficients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            at = ctx.at.requires_grad_()
            (found,) = torch.autograd.grad(ctx.constraint(at), at, grad)
        return found, None


class _Merged(torch.autograd.Function):
    """base + sum_t coefficients_t (x_t - base); `weights` are the coefficients' values."""

    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Tensor,
        weights: list[float],
        base: Tensor,
        xs: list[Tensor],
        backend: str,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.base, ctx.xs, ctx.backend, ctx.device = base, xs, backend, coefficients.device
        return merge_deltas(base, xs, weights, out_dtype=dtype, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = coefficient_gradients(grad, ctx.xs, base=ctx.base, backend=ctx.backend)
        return found.to(ctx.device), None, None, None, None, None


class MergedModel(nn.Module):
    """W = base + sum_t c_t (x_t - base) as the parameters of `model`, with gradients by c.

    model: the architecture; its forward runs with the merged parameters in the place of its own,
    which stay as they are. state_dicts: the N fine-tuned models. base: a state dict, by default
    the parameters of `model`. All hold every parameter of `model` by its name, of tied ones by any
    of their names, in one shape and dtype each; merged parameters have the dtype of `model`, so
    that bfloat16 files serve a float32 model. Buffers are those of `model`, as in FusionBench:
    statistics of activations are not linear in the weights.
    coefficients: one number, one a model, or [N, layers]; the nn.Parameter `coefficients`, float32
    [N, layers], is what to optimise.
    layers: "tensor" has coefficients of its own for each tensor (layer-wise), "model" one for each
    model (task-wise); or a function from a parameter's name to that of its layer. The attribute
    `layers` names the columns.
    clamp: to [0, 1]. softmax: over the models, after that. Both are differentiated too.

    Result: merged weights have the bits of `merge_deltas` (task arithmetic), gradients the bound
    of `coefficient_gradients`, rounded once to float32. Weights are merged anew when coefficients
    have changed, or the parameters of `model` where they are the base, not when somebody writes
    into the state dicts given; the graph holds no tensor for a
    model, and every loss of one merge may be differentiated by a call of `backward` of its own.
    `to` and its like move the models too.
    Cost: a merge reads base and the N models and writes W; a gradient reads dL/dW, base and the N
    models. No difference x_t - base is stored: beside the models given, memory holds W and the
    gradients by W that are on their way.
    Raises: ArgumentError for models that do not fit, coefficients of another shape or not finite.
    Source: AdaMerging (Yang et al., 2310.02575); FusionBench `LayerWiseMergedModel`,
    `TaskWiseMergedModel`.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.zeros(1, 2)})
    >>> tuned = [{"weight": torch.tensor([[1.0, 0.0]])}, {"weight": torch.tensor([[0.0, 2.0]])}]
    >>> merged = MergedModel(model, tuned, coefficients=0.5)
    >>> merged(torch.tensor([3.0, 4.0])).sum().backward()
    >>> merged.coefficients.grad
    tensor([[3.],
            [8.]])
    >>> merged.merge()
    {'weight': tensor([[0.5000, 1.0000]])}
    """

    coefficients: nn.Parameter

    def __init__(
        self,
        model: nn.Module,
        state_dicts: Sequence[Mapping[str, Any]],
        *,
        base: Mapping[str, Any] | None = None,
        coefficients: float | Sequence[Any] | Tensor = 0.3,
        layers: str | Callable[[str], str] = "tensor",
        clamp: bool = True,
        softmax: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(layers, str):
            check.choice(_OP, "layers", layers, tuple(LAYERS))
            layers = LAYERS[layers]
        if not isinstance(model, nn.Module):
            got = type(model).__name__
            raise ArgumentError.of(_OP, "model is no network", got, "a torch.nn.Module")
        self.model, self.clamp, self.softmax, self.backend = model, clamp, softmax, backend
        own = dict(model.named_parameters())
        if not own or not state_dicts:
            got = f"{len(own)} parameters, {len(state_dicts)} state dicts"
            raise ArgumentError.of(_OP, "there is nothing to merge", got, "at least one of each")
        self._models = [
            _parameters(f"state_dicts[{t}]", d, model) for t, d in enumerate(state_dicts)
        ]
        self._base = None if base is None else _parameters("base", base, model)
        origin = ("the model", own) if self._base is None else ("base", self._base)
        _require_one_dtype(self._models, *origin)
        self._places = _places(model)
        self._layer_of = {name: layers(name) for name in own}
        self.layers = tuple(dict.fromkeys(self._layer_of.values()))
        values = _matrix(coefficients, len(state_dicts), len(self.layers))
        self.coefficients = nn.Parameter(values.to(next(iter(own.values())).device))
        self._merged: tuple[Any, dict[str, Tensor]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = self.weights()
        placed = {place: weights[name] for place, name in self._places.items()}
        return functional_call(self.model, placed, args, kwargs, tie_weights=False)

    def weights(self) -> dict[str, Tensor]:
        """The merged parameters by name; autograd knows how they depend on the coefficients."""
        made_of = self._made_of()
        graph = torch.is_grad_enabled() and self.coefficients.requires_grad
        if self._merged is not None and self._merged[0] == made_of:
            known = self._merged[1]
            first = next(iter(known.values()))
            usable = torch.is_inference_mode_enabled() or not first.is_inference()
            if usable and (first.requires_grad or not graph):
                return known
        self._merged = None  # its memory may serve the next one
        check.finite(_OP, "coefficients", self.coefficients.detach())
        effective: Tensor = _Constrained.apply(self.coefficients, self._constraint)  # type: ignore[no-untyped-call]
        columns = dict(zip(self.layers, effective.unbind(1), strict=True))
        weights = dict(zip(self.layers, effective.T.tolist(), strict=True))
        merged = {}
        for name, own in self.model.named_parameters():
            layer = self._layer_of[name]
            base = (own if self._base is None else self._base[name]).detach()
            xs = [d[name] for d in self._models]
            merged[name] = _Merged.apply(  # type: ignore[no-untyped-call]
                columns[layer], weights[layer], base, xs, self.backend, own.dtype
            )
        self._merged = made_of, merged
        return merged

    def _made_of(self) -> Any:
        """What merged weights depend on, but for the models given: equal, they are made already."""
        own = () if self._base is not None else self.model.parameters()
        base = [(x.data_ptr(), None if x.is_inference() else x._version) for x in own]
        return self.coefficients.tolist(), self.clamp, self.softmax, base

    def merge(self) -> dict[str, Any]:
        """The merged state dict: parameters, and the buffers and other state of `model`."""
        with torch.no_grad():
            merged = self.weights()
        name_of = {id(x): name for name, x in self.model.named_parameters()}
        found = {
            key: merged[name_of[id(x)]] if id(x) in name_of else x
            for key, x in self.model.state_dict(keep_vars=True).items()
        }
        return {
            key: x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x)
            for key, x in found.items()
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergedModel:
        """As `to`, `cuda` and the like go through a network."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._merged = None
        self._models = [{name: fn(x) for name, x in d.items()} for d in self._models]
        if self._base is not None:
            self._base = {name: fn(x) for name, x in self._base.items()}
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_merged": None}  # a graph is neither copied nor stored

    def _constraint(self, coefficients: Tensor) -> Tensor:
        values = coefficients.double()
        values = values.clamp(0, 1) if self.clamp else values
        return values.softmax(0) if self.softmax else values


def _places(model: nn.Module) -> dict[str, str]:
    """Where a parameter stands -> its name, for tied weights more than one place.

    functional_call can tie them itself, but leaves the merged one in a module with two names.
    """
    name_of = {id(x): name for name, x in model.named_parameters()}
    return {
        f"{prefix}.{key}" if prefix else key: name_of[id(x)]
        for prefix, module in model.named_modules()
        for key, x in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def _parameters(label: str, state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Its tensors for the parameters of `model`; other names must be names of `model` too.

    Where `model` ties weights, any of their names will do, and several must hold the same.
    """
    if not isinstance(state_dict, Mapping):
        got = type(state_dict).__name__
        what = f"{label} is no mapping"
        raise ArgumentError.of(_OP, what, got, "names to tensors (a state dict)")
    names = model.state_dict().keys()
    unknown = [key for key in state_dict if key not in names]
    if unknown:
        what = f"{label} holds tensors that the model has not"
        raise ArgumentError.of(_OP, what, ", ".join(map(repr, unknown)), "its names alone")
    own = dict(model.named_parameters())
    given: dict[str, Tensor] = {}
    name_of = {id(x): name for name, x in own.items()}
    for place, parameter in model.named_parameters(remove_duplicate=False):
        if place not in state_dict:
            continue
        name = name_of[id(parameter)]
        x = check.tensor(_OP, state_dict[place], f"{label}[{place!r}]")
        known = given.setdefault(name, x)
        if x is known:
            continue
        if Signature.of(x) != Signature.of(known) or not identical(x, known):
            what = f"{label} unties weights that the model ties"
            raise ArgumentError.of(_OP, what, f"another {place} than {name}", "the same twice")
    require_fit(_OP, {"the model": own, label: given})
    return given


def _require_one_dtype(
    models: Sequence[Mapping[str, Tensor]], label: str, base: Mapping[str, Tensor]
) -> None:
    for name, zero in base.items():
        for t, given in enumerate(models):
            check.same(_OP, f"state_dicts[{t}][{name!r}]", given[name], label, zero)


def _matrix(coefficients: float | Sequence[Any] | Tensor, n: int, layers: int) -> Tensor:
    expected = f"a number, [{n}] or [{n}, {layers}]"
    try:
        values = torch.as_tensor(coefficients, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError):
        got = type(coefficients).__name__
        raise ArgumentError.of(_OP, "coefficients are no numbers", got, expected) from None
    values = values[:, None] if values.shape == (n,) else values
    if values.ndim and values.shape not in ((n, 1), (n, layers)):
        raise ArgumentError.of(_OP, "coefficients do not fit", list(values.shape), expected)
    values = values.expand(n, layers).clone()
    check.finite(_OP, "coefficients", values)
    return values
