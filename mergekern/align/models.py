"""Models that belong together: of one architecture, and those that were seen before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .. import check
from ..errors import ArgumentError
from .program import Program, state_of
from .spaces import Spaces

_SHOWN = 12  # digits of a fingerprint that a sentence shows


def states_of(op: str, models: Sequence[nn.Module], program: Program) -> list[dict[str, Tensor]]:
    """The tensors of each model: those that the traced one has, of its shapes, on one device."""
    shapes = {
        program.names[n.name]: tuple(n.meta["val"].shape)
        for n in program.placeholders()
        if n.name in program.names
    }
    states = [state_of(model) for model in models]
    if not states[0]:
        raise ArgumentError.of(op, "models[0] has no tensors", "none", "parameters")
    first = next(iter(states[0].values())).device
    for i, (model, state) in enumerate(zip(models, states, strict=True)):
        own = {name: tuple(x.shape) for name, x in state.items() if name in shapes}
        odd = sorted(set(model.state_dict()) ^ program.persistent)
        odd += [name for name, shape in shapes.items() if own.get(name) != shape]
        if odd:
            name = odd[0]
            got = f"{name} {list(state[name].shape)}" if name in state else f"no {name}"
            expected = f"{name} {list(shapes[name])}" if name in shapes else f"no {name}"
            what = f"models[{i}] is of another architecture than the spaces"
            raise ArgumentError.of(op, what, got, expected)
        for name, x in state.items():
            if x.device != first:
                what = f"{name} of models[{i}] is on another device"
                raise ArgumentError.of(op, what, x.device, first)
    return states


def fingerprints(models: Sequence[nn.Module]) -> tuple[str, ...]:
    """SHA-256 of the name, dtype, shape and bytes of every parameter and buffer.

    Side by side: hashlib frees the GIL.
    """
    with ThreadPoolExecutor(check.threads(), "mergekern-fingerprint") as pool:
        return tuple(pool.map(_of_model, models))


def _of_model(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, x in state_of(model).items():
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(_bytes(x))
    return digest.hexdigest()


def spaces_fingerprint(spaces: Spaces) -> str:
    """SHA-256 of all that says which features there are, where they lie and where they are read."""
    digest = hashlib.sha256()
    for s in spaces.values():
        digest.update(repr((s.name, s.size, s.heads, s.group, s.inside, s.fixed)).encode())
        for place in s.places:
            digest.update(repr((place.name, place.axis, place.role)).encode())
            digest.update(_bytes(place.positions))
        for probe in s.probes:
            digest.update(repr((probe.node, probe.arg, probe.axes)).encode())
            digest.update(_bytes(probe.positions))
    return digest.hexdigest()


def require(op: str, models: Sequence[nn.Module], seen: Sequence[str]) -> None:
    """Raises ArgumentError unless the models have these fingerprints."""
    if len(models) != len(seen):
        got, expected = f"{len(models)} models", f"the {len(seen)} that were seen"
        raise ArgumentError.of(op, "statistics are of other models", got, expected)
    for i, (mine, its) in enumerate(zip(fingerprints(models), seen, strict=True)):
        if mine != its:
            what = f"models[{i}] is not the one that statistics are of"
            raise ArgumentError.of(op, what, f"SHA-256 {mine[:_SHOWN]}", its[:_SHOWN])


def _bytes(x: Tensor) -> memoryview:
    return x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
