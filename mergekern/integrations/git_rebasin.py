"""Git Re-Basin's weight matching by mergekern: import from here what scripts of its PyTorch port
import from `utils.weight_matching`.

The same names, signatures and permutations: the matchings are made in the same order, drawn from
torch's generator, of the same sums. A permutation is an int64 index here, a float tensor there;
progress is not printed. A parameter that the specification does not name is an error that lists
all of them, where the port raises KeyError at the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..ops.assign import assign
from ..ops.permute import permute, permute_all

Axes = dict[str, tuple[str | None, ...]]
Permutation = dict[str, Tensor]


class PermutationSpec(NamedTuple):
    """Which axes of which parameters each permutation moves, and the other way round."""

    perm_to_axes: dict[str, list[tuple[str, int]]]
    axes_to_perm: Axes


def permutation_spec_from_axes_to_perm(axes_to_perm: Axes) -> PermutationSpec:
    """Both directions, from the permutation (or None) of every axis of every parameter.

    >>> permutation_spec_from_axes_to_perm({"w": ("P", None), "b": ("P",)}).perm_to_axes
    {'P': [('w', 0), ('b', 0)]}
    """
    perm_to_axes: dict[str, list[tuple[str, int]]] = {}
    for key, perms in axes_to_perm.items():
        for axis, perm in enumerate(perms):
            if perm is not None:
                perm_to_axes.setdefault(perm, []).append((key, axis))
    return PermutationSpec(perm_to_axes, axes_to_perm)


def mlp_permutation_spec(num_hidden_layers: int) -> PermutationSpec:
    """Of layer0 to layer{num_hidden_layers}, with weight and bias."""
    if num_hidden_layers < 1:
        raise ArgumentError.of(
            "mlp_permutation_spec", "no hidden layer", num_hidden_layers, "at least 1"
        )
    hidden, last = range(num_hidden_layers), f"layer{num_hidden_layers}"
    axes: Axes = {"layer0.weight": ("P_0", None)}
    axes |= {f"layer{i}.weight": (f"P_{i}", f"P_{i - 1}") for i in hidden[1:]}
    axes |= {f"layer{i}.bias": (f"P_{i}",) for i in hidden}
    axes |= {f"{last}.weight": (None, f"P_{hidden[-1]}"), f"{last}.bias": (None,)}
    return permutation_spec_from_axes_to_perm(axes)


def resnet20_permutation_spec() -> PermutationSpec:
    """Of three stages of three blocks, the first of each with a convolution as shortcut."""
    return _resnet_spec(3)


def resnet50_permutation_spec() -> PermutationSpec:
    """Of three stages of eight blocks, the first of each with a convolution as shortcut."""
    return _resnet_spec(8)


def _resnet_spec(blocks: int) -> PermutationSpec:
    axes = _conv("conv1", None, "P_bg0")
    for stage in range(1, 4):
        for block in range(blocks):
            name, width = f"layer{stage}.{block}", f"P_bg{stage}"
            before, inner = width if block else f"P_bg{stage - 1}", f"P_{name}_inner"
            axes |= _norm(f"{name}.bn1", before) | _conv(f"{name}.conv1", before, inner)
            axes |= _norm(f"{name}.bn2", inner) | _conv(f"{name}.conv2", inner, width)
            if not block:
                axes |= _conv(f"{name}.shortcut.0", before, width)
                axes |= _norm(f"{name}.shortcut.1", width)
    axes |= _norm("bn1", "P_bg3") | {"linear.weight": (None, "P_bg3"), "linear.bias": (None,)}
    return permutation_spec_from_axes_to_perm(axes)


def vgg16_permutation_spec() -> PermutationSpec:
    """Of `features`, thirteen convolutions each with a norm after it, and `classifier`."""
    convs = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
    perms = [f"P_Conv_{i}" for i in convs]
    tail = ("weight", "bias", "running_mean", "running_var")
    axes: Axes = {"features.0.weight": (perms[0], None, None, None)}
    axes |= {f"features.1.{part}": (perms[0], None) for part in tail}
    axes["features.1.num_batches_tracked"] = ()
    for i, before, perm in zip(convs[1:], perms, perms[1:]):
        axes[f"features.{i}.weight"] = (perm, before, None, None)
    axes |= {
        f"features.{i}.bias": (perm,) for i, perm in zip((*convs[1:], 0), (*perms[1:], perms[0]))
    }
    for part in tail:
        axes |= {f"features.{i + 1}.{part}": (perm, None) for i, perm in zip(convs[1:], perms[1:])}
    axes |= {f"features.{i + 1}.num_batches_tracked": () for i in convs[1:]}
    axes |= {"classifier.weight": ("P_Dense_0", perms[-1]), "classifier.bias": ("P_Dense_0",)}
    return permutation_spec_from_axes_to_perm(axes)


def _conv(name: str, before: str | None, after: str) -> Axes:
    return {f"{name}.weight": (after, before, None, None)}


def _norm(name: str, perm: str) -> Axes:
    return {f"{name}.weight": (perm,), f"{name}.bias": (perm,)}


def get_permuted_param(
    ps: PermutationSpec,
    perm: Mapping[str, Tensor],
    k: str,
    params: Mapping[str, Tensor],
    except_axis: int | None = None,
) -> Tensor:
    """params[k] with its axes permuted, all but `except_axis`."""
    return permute(params[k], _indices(ps, perm, k, except_axis))


def apply_permutation(
    ps: PermutationSpec, perm: Mapping[str, Tensor], params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All of params permuted, in one call of `permute_all`.

    Raises: ArgumentError for parameters that the specification does not name.

    >>> ps = permutation_spec_from_axes_to_perm({"w": ("P", None), "b": ("P",)})
    >>> params = {"w": torch.eye(2), "b": torch.arange(2)}
    >>> apply_permutation(ps, {"P": torch.tensor([1, 0])}, params)["b"]
    tensor([1, 0])
    """
    unknown = sorted(params.keys() - ps.axes_to_perm.keys())
    if unknown:
        raise ArgumentError.of(
            "apply_permutation", "parameters without axes", ", ".join(unknown), "in the spec"
        )
    return permute_all(params, {k: _indices(ps, perm, k, None) for k in params})


def _indices(
    ps: PermutationSpec, perm: Mapping[str, Tensor], k: str, except_axis: int | None
) -> dict[int, Tensor]:
    """By axis; the port holds its permutations in float32."""
    axes = enumerate(ps.axes_to_perm[k])
    return {a: perm[p].long() for a, p in axes if p is not None and a != except_axis}


def weight_matching(
    ps: PermutationSpec,
    params_a: Mapping[str, Tensor],
    params_b: Mapping[str, Tensor],
    max_iter: int = 100,
    init_perm: Mapping[str, Tensor] | None = None,
) -> Permutation:
    """The permutations of params_b that bring it closest to params_a, one after the other.

    Each step takes the best assignment of one permutation with the others fixed, by the products of
    the weights of both models along its axes; rounds go on, in random order, while one of them
    gains. Cost: a round is one product [n, m] x [m, n] for each parameter and axis it permutes.
    Source: Git Re-Basin (Ainsworth et al., 2209.04836), PermutationCoordinateDescent.
    """
    first = {p: axes[0] for p, axes in ps.perm_to_axes.items()}
    sizes = {p: params_a[key].shape[axis] for p, (key, axis) in first.items()}
    perm: dict[str, Any] = {p: torch.arange(n) for p, n in sizes.items()}
    if init_perm is not None:
        perm = {p: i.long() for p, i in init_perm.items()}
    names = list(perm)
    for _ in range(max_iter):
        progress = False
        for i in torch.randperm(len(names)).tolist():
            p = names[i]
            n = sizes[p]
            score = torch.zeros(n, n)
            for key, axis in ps.perm_to_axes[p]:
                b = get_permuted_param(ps, perm, key, params_b, except_axis=axis)
                rows = [w.movedim(axis, 0).reshape(n, -1) for w in (params_a[key], b)]
                score += rows[0] @ rows[1].T
            found = assign(score.double())  # of several best ones the port's
            rows_of = range(n)
            gained = score[rows_of, found].sum() > score[rows_of, perm[p]].sum() + 1e-12
            progress |= bool(gained)
            perm[p] = found
        if not progress:
            break
    return perm
