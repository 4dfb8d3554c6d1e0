"""RegMean: moments once for layers that share an input, and a solve in the place of an inverse."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...align.input_moments import InputMoments
from ...errors import ArgumentError
from ...methods.merge import merge_tensors
from .pool import as_pool, merge_all, named


def regmean_params_merge(
    param_weight_list: Sequence[Tensor],
    param_regmean_list: Sequence[Tensor],
    reduce_non_diagonal_ratio: float = 1.0,
    weight_transpose: bool = True,
    module_name: str = "",
    device: Any = "cpu",
) -> Tensor:
    """(sum_i G_i)^-1 sum_i G_i W_i^T, transposed, as FusionBench's function of that name.

    `device` is not used, there as here: all stays where the weights are.
    """
    given = [w if weight_transpose else w.T for w in param_weight_list]
    merged = merge_tensors(
        given,
        "regmean",
        gram=[
            g.to(w.device, torch.float32 if g.itemsize == 2 else g.dtype)
            for w, g in zip(given, param_regmean_list, strict=True)
        ],
        reduce=reduce_non_diagonal_ratio,
        name=module_name,
    )
    return merged if weight_transpose else merged.T


def merging_with_regmean_weights(
    models_to_merge_param_dict: Mapping[str, Sequence[Tensor]],
    models_to_merge_regmean_weights_list: Sequence[Mapping[str, Tensor]],
    reduce_non_diagonal_ratio: float = 1.0,
    weight_transpose: bool = True,
) -> dict[str, Tensor]:
    """Weights of modules that have a Gram matrix by it, the rest averaged, as FusionBench's."""

    def mean(_: Tensor | None, xs: list[Tensor]) -> Tensor:
        return merge_tensors(xs, "linear", weight=1.0)

    merged = {}
    for name, xs in models_to_merge_param_dict.items():
        module = name.removesuffix(".weight")
        known = [module in grams for grams in models_to_merge_regmean_weights_list]
        if module != name and any(known):
            if not all(known):
                what = f"{module} has a Gram matrix in some models only"
                raise ArgumentError.of("regmean", what, known, "all or none")
            merged[name] = regmean_params_merge(
                xs,
                [grams[module] for grams in models_to_merge_regmean_weights_list],
                reduce_non_diagonal_ratio,
                weight_transpose,
                module,
            )
        else:
            merged |= merge_all("regmean", None, [{name: x} for x in xs], mean)
    return merged


class RegMean:
    """out = (sum_i G_i)^-1 sum_i G_i W_i^T of linear layers, other tensors averaged."""

    _include_module_type: Sequence[type[nn.Module]]
    exclude_param_names_regex: Sequence[str]
    reduce_non_diagonal_ratio: float
    weight_transpose: bool
    modelpool: Any
    on_regmean_start: Any
    get_regmean_weights: Any

    @torch.no_grad()
    def run(self, modelpool: Any, **kwargs: Any) -> nn.Module:
        self.modelpool = pool = as_pool(modelpool)
        self.on_regmean_start()
        given, grams = [], []
        excluded = self.exclude_param_names_regex or ()
        for task, model in pool.named_models():
            state = model.state_dict()
            given.append(
                {n: x for n, x in state.items() if not any(re.match(p, n) for p in excluded)}
            )
            kinds = tuple(self._include_module_type)
            layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
            data = pool.load_train_dataset(task)
            grams.append(
                self.get_regmean_weights(
                    task, model, train_dataset=data, linear_modules_to_merge=layers
                )
            )
        merged = merging_with_regmean_weights(
            dict(named("regmean", given)),
            grams,
            self.reduce_non_diagonal_ratio,
            self.weight_transpose,
        )
        result = pool.load_model("_pretrained_")
        result.load_state_dict(merged, strict=False)
        return result


class RegMeanForCLIP(RegMean):
    """RegMean of CLIP's image encoders, over images of each task."""

    num_regmean_examples: int
    dataloader_kwargs: Mapping[str, Any]
    clip_processor: Any
    fabric: Any
    compute_logits: Any

    @torch.no_grad()
    def get_regmean_weights(
        self,
        model_name: str,
        model: nn.Module,
        train_dataset: Any,
        linear_modules_to_merge: Mapping[str, nn.Linear],
    ) -> dict[str, Tensor]:
        """Second moments of what goes into each layer, float32, on the CPU."""
        dataset = importlib.import_module("fusion_bench.dataset.clip_dataset").CLIPDataset
        loader = torch.utils.data.DataLoader(
            dataset(train_dataset, self.clip_processor), shuffle=True, **self.dataloader_kwargs
        )
        model = self.fabric.setup(model)
        moments, count = InputMoments(model_name, "error", "auto"), 0
        with moments.watching({name: [m] for name, m in linear_modules_to_merge.items()}):
            for batch in self.fabric.setup_dataloaders(loader):
                if count >= self.num_regmean_examples:
                    break
                self.compute_logits(model, batch, model_name)
                count += len(batch[0])
        found = {}
        for names, each in moments.groups():
            found.update(dict.fromkeys(names, each.second_moment().float().cpu()))
        return found
