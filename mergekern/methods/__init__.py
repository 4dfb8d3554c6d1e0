"""Merge methods: recipes over ops, in one registry, with mergekit's names and defaults."""

from __future__ import annotations

from . import (
    della,
    emr,
    fisher,
    geometry,
    interpolation,
    masks,
    ram,
    regmean,
    sce,
    selective,
    spectral,
    task_vectors,
    whole_model,
    wudi,
)
from .registry import Inputs, Method, Parameter

REGISTRY: dict[str, Method] = {
    m.name: m
    for m in (
        interpolation.LINEAR,
        interpolation.PASSTHROUGH,
        geometry.SLERP,
        geometry.NUSLERP,
        geometry.MULTISLERP,
        geometry.KARCHER,
        geometry.MODEL_STOCK,
        task_vectors.TASK_ARITHMETIC,
        task_vectors.TIES,
        task_vectors.DARE_LINEAR,
        task_vectors.DARE_TIES,
        task_vectors.BREADCRUMBS,
        task_vectors.BREADCRUMBS_TIES,
        task_vectors.MAGNITUDE_PRUNE,
        della.DELLA,
        della.DELLA_LINEAR,
        sce.SCE,
        ram.RAM,
        ram.RAMPLUS_TL,
        whole_model.TIES_GLOBAL,
        selective.NEARSWAP,
        selective.ARCEE_FUSION,
        fisher.FISHER,
        regmean.REGMEAN,
        emr.EMR_MERGING,
        masks.MAGMAX,
        masks.CONSENSUS,
        wudi.WUDI,
        wudi.WUDI_EXACT,
        spectral.TSV_M,
        spectral.ISO_C,
        spectral.ISO_CTS,
        spectral.SVC,
    )
}


def methods() -> dict[str, Method]:
    """Every merge method: name -> its parameters (type, scope, default), bases, model count.

    >>> methods()["ties"].parameter("density").default
    1.0
    """
    return dict(REGISTRY)


__all__ = ["REGISTRY", "Inputs", "Method", "Parameter", "methods"]
