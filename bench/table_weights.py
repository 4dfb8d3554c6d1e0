"""Weight matching of two ViT-B/16 with random weights: ours beside Git Re-Basin's PyTorch port.

`python -m bench.table_weights` prints both and writes them under bench/results. The objective is
sum over tensors W of <W_0, P W_1> in float64. The port has no heads, so that queries, keys and
values stay as they are; ours is measured on the same spaces and on all. The port's part needs
MERGEKERN_REBASIN, a checkout of it, and takes some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mergekern as mk
from bench import paths  # noqa: F401

import rebasin
from measure import seconds
from report import describe
from vits import ViT, vit_b

RESULTS = Path(__file__).parent / "results"
State = Mapping[str, Tensor]


def axes(state: State) -> dict[str, tuple[str | None, ...]]:
    """As the port's specifications: the space of every axis, where one may move."""
    stream = "stream"
    found: dict[str, tuple[str | None, ...]] = {}
    for key, x in state.items():
        block, _, layer = key.removeprefix("blocks.").partition(".")
        hidden = f"hidden.{block}"
        if x.ndim == 3:  # the class token and positions
            found[key] = (None, None, stream)
        elif key.startswith("patch_embed"):
            found[key] = (stream, None, None, None)[: x.ndim]
        elif layer.startswith("fc1"):
            found[key] = (hidden, stream)[: x.ndim]
        elif layer.startswith("fc2"):
            found[key] = (stream, hidden)[: x.ndim]
        elif layer.startswith("attn.qkv") or key.startswith("head"):
            found[key] = (None, stream)[: x.ndim]
        else:  # attn.proj, the inputs of which are values; norms
            found[key] = (stream, None)[: x.ndim]
    return found


def objective(a: State, b: State) -> float:
    return sum(float((a[key].double() * b[key].double()).sum()) for key in a)


def theirs(a: State, b: State, max_iter: int) -> dict[str, float]:
    port = rebasin.port()
    spec = port.permutation_spec_from_axes_to_perm(axes(a))
    told, found = io.StringIO(), {}

    def call() -> None:
        torch.manual_seed(0)  # the order of spaces
        with contextlib.redirect_stdout(told), torch.no_grad():
            found.update(port.weight_matching(spec, a, b, max_iter))

    taken = seconds(call)
    steps = len(told.getvalue().splitlines())  # one for each space of a sweep
    value = objective(a, port.apply_permutation(spec, found, b))
    return {"seconds": taken, "sweeps": steps / len(spec.perm_to_axes), "objective": value}


def ours(models: list[ViT], spaces: mk.Spaces, start: str) -> dict[str, float]:
    """The objective is told by the mean M of A and P B: <A, P B> = 2 <A, M> - <A, A>."""
    made: list[Any] = []
    options = {"method": "weights", "models": models, "start": start}
    taken = seconds(lambda: made.append(mk.match(spaces, **options)))
    (found,) = made
    a, m = models[0].state_dict(), mk.apply(models, found).state_dict()
    value = 2 * objective(a, m) - objective(a, a)
    return {"seconds": taken, "sweeps": found.objectives[0].sweeps, "objective": value}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table_weights")
    parser.add_argument("--sweeps", type=int, default=100, help="of the port, at most")
    options = parser.parse_args()
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(vit_b().eval())
    a, b = (m.state_dict() for m in models)
    out: dict[str, Any] = {"machine": describe(), "as they are": {"objective": objective(a, b)}}
    if rebasin.AT_HAND:
        out["git re-basin"] = theirs(a, b, options.sweeps)
        print("git re-basin", out["git re-basin"], flush=True)
    every = mk.discover_spaces(models[0], torch.zeros(2, 3, 224, 224))
    same = mk.Spaces([s for s in every.values() if s.heads == 1], every.program, every.layout)
    for name, spaces, start in (
        ("mergekern", same, "identity"),
        ("mergekern with heads", every, "identity"),
        ("mergekern with heads, best start", every, "best"),
    ):
        out[name] = ours(models, spaces, start)
        print(name, out[name], flush=True)
    (RESULTS / "weights-vit-b.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
