"""Merge methods: recipes over ops, in one registry, with mergekit's names and defaults."""

from __future__ import annotations

from . import emr, fisher, interpolation, masks, selective, task_vectors
from .registry import Inputs, Method, Parameter

REGISTRY: dict[str, Method] = {
    m.name: m
    for m in (
        interpolation.LINEAR,
        interpolation.SLERP,
        interpolation.PASSTHROUGH,
        task_vectors.TASK_ARITHMETIC,
        task_vectors.TIES,
        task_vectors.DARE_LINEAR,
        task_vectors.DARE_TIES,
        selective.NEARSWAP,
        selective.ARCEE_FUSION,
        fisher.FISHER,
        emr.EMR_MERGING,
        masks.MAGMAX,
        masks.CONSENSUS,
    )
}


def methods() -> dict[str, Method]:
    """Every merge method: name -> its parameters (type, scope, default), bases, model count.

    >>> methods()["ties"].parameter("density").default
    1.0
    """
    return dict(REGISTRY)


__all__ = ["REGISTRY", "Inputs", "Method", "Parameter", "methods"]
