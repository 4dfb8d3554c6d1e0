"""How `LoraModel.add_weighted_adapter` makes the factors of a layer by its SVD combinations."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...adapters.adapter import Factors
from ...adapters.factors import sum_of, svd_of_product
from ...adapters.truncation import best_of_rank
from ...check import FLOATS
from .fallback import LORA_MODEL, product_dtype, served, theirs
from .functions import FUNCTIONS

METHOD = "_svd_generalized_task_arithmetic_weighted_adapter"
# The function that merges task vectors, and how many of density and election it takes.
_MERGES = {
    "svd": ("task_arithmetic", 0),
    "ties_svd": ("ties", 2),
    "dare_linear_svd": ("dare_linear", 1),
    "dare_ties_svd": ("dare_ties", 2),
    "magnitude_prune_svd": ("magnitude_prune", 1),
}
# Classes of layers whose task vector is the scaled product of the factors, up to its layout.
_PRODUCTS = ("Linear", "Embedding", "_ConvNd", "MultiheadAttention")


@torch.no_grad()
def svd_weighted_adapter(
    self: Any,
    combination_type: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    new_rank: int,
    target: Any,
    target_lora_A: Tensor,
    target_lora_B: Tensor,
    density: float | None,
    majority_sign_method: str,
    clamp: float | None = None,
    full_matrices: bool = True,
    driver: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors (a, b) of the best approximation of rank new_rank to a layer's merged change.

    a has orthonormal rows. `svd` is computed from the factors, with no matrix of the layer's size.
    The others merge the task vectors that PEFT has, as PEFT does. Both end in float64 and are
    rounded once, to the dtype that PEFT's result has. `full_matrices` says how much PEFT computes,
    not what it keeps.
    Source: PEFT `LoraModel._svd_generalized_task_arithmetic_weighted_adapter`.
    """
    there = [name in target.lora_A or name in target.lora_embedding_A for name in adapters]
    names = [name for name, is_there in zip(adapters, there) if is_there]
    shares = [weight for weight, is_there in zip(weights, there) if is_there]
    given = [_factors(target, name) for name in names]
    reason = _why_not(combination_type, given, new_rank, clamp, driver)
    if reason:
        call = theirs(METHOD, reason, LORA_MODEL, combination_type)
        options = (density, majority_sign_method, clamp, full_matrices, driver)
        layer = (target, target_lora_A, target_lora_B)
        return call(self, combination_type, adapters, weights, new_rank, *layer, *options)
    factors = [f for f in given if f is not None]
    scaling = torch.tensor(shares).to(target_lora_B.device)
    if combination_type == "svd" and _is_product(target, factors, new_rank):
        u, s, vh = svd_of_product(*sum_of(factors, shares))
        b, a = u[:, :new_rank] * s[:new_rank], vh[:new_rank]
        dtype = product_dtype(factors[0].b, scaling)
    else:
        merged = _merged(target, names, scaling, combination_type, (density, majority_sign_method))
        b, a, _ = best_of_rank(merged, new_rank)
        dtype = merged.dtype
    served[combination_type] += 1
    a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    return a.reshape(target_lora_A.shape), b.reshape(target_lora_B.shape)


def _factors(target: Any, name: str) -> Factors | None:
    """Those of an adapter in a layer as matrices; None where they are none of plain numbers."""
    if name in target.lora_A:
        a, b = target.lora_A[name].weight, target.lora_B[name].weight
    else:
        a, b = target.lora_embedding_A[name], target.lora_embedding_B[name]
    if any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta for x in (a, b)):
        return None
    if a.dtype not in FLOATS or a.dtype != b.dtype or a.device != b.device:
        return None
    a, b = a.detach().flatten(1), b.detach().flatten(1)
    return Factors(a, b, target.scaling[name]) if len(a) == b.shape[1] else None


def _why_not(
    combination_type: str,
    given: Sequence[Factors | None],
    rank: int,
    clamp: float | None,
    driver: str | None,
) -> str | None:
    """None, or why PEFT has to do this layer itself."""
    if combination_type not in _MERGES or not given:
        return "arguments that PEFT refuses"
    if clamp is not None:
        return "svd_clamp, which cuts entries of factors that are not unique"
    if driver is not None:
        return "svd_driver, which names a method of cuSOLVER"
    if any(f is None for f in given):
        return "factors that are no plain matrices, as of a grouped convolution"
    sides = [(len(f.b), f.a.shape[1]) for f in given if f is not None]
    return "a rank above a side of the layer" if rank > min(min(pair) for pair in sides) else None


def _is_product(target: Any, factors: Sequence[Factors], rank: int) -> bool:
    """Whether the layer's task vectors are the products, of enough columns together."""
    layers = pkgutil.resolve_name("peft.tuners.lora.layer")
    known = [getattr(layers, name).get_delta_weight for name in _PRODUCTS if hasattr(layers, name)]
    return type(target).get_delta_weight in known and rank <= sum(f.rank for f in factors)


def _merged(
    target: Any,
    names: Sequence[str],
    scaling: Tensor,
    combination_type: str,
    options: tuple[Any, ...],
) -> Tensor:
    """The merged task vector as PEFT has it, with the layout [out, in] of its factors."""
    deltas = [target.get_delta_weight(name) for name in names]
    function, count = _MERGES[combination_type]
    merged = FUNCTIONS[function](deltas, scaling, *options[:count]).flatten(1)
    transposed = getattr(target, "fan_in_fan_out", False) or names[0] in target.lora_embedding_A
    return merged.T if transposed else merged
