"""How similar the parameters of features are, between models and within them (MuDSC)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .merging import Labels
from .spaces import Space, Spaces
from .weights import accumulator_of, parameter_places, parameters_of, rows_of


class WeightSimilarity:
    """Cosines of what features have in all parameters, read in the merged order of the others."""

    def __init__(self, spaces: Spaces, models: Sequence[nn.Module], within: bool) -> None:
        self.parameters = [parameters_of(model) for model in models]
        self.places = parameter_places(spaces, self.parameters[0])
        self.within, self.device = within, next(iter(self.parameters[0].values())).device

    def of(self, space: Space, labels: Labels) -> Tensor:
        """float64, shaped as `Statistics.correlation`; 0 for features whose parameters are 0."""
        size, models = space.size, len(self.parameters)
        left = models * size if self.within else size
        products, squares = (
            torch.zeros(shape, dtype=torch.float64, device=self.device)
            for shape in ((left, models * size), (models * size,))
        )
        for name, places in self.places.items():
            for place in (place for own, place in places if own is space):
                merged = [self._merged(i, name, place.axis, labels) for i in range(models)]
                x = torch.cat([rows_of(m, place) for m in merged])
                products += x[:left] @ x.T
                squares += x.double().square().sum(1)
        norms = squares.sqrt()
        scale = torch.outer(norms[:left], norms)
        cosines = torch.where(scale > 0, products / scale, 0.0).clamp(-1, 1)
        return cosines if self.within else cosines[:, size:]

    def _merged(self, model: int, name: str, except_axis: int, labels: Labels) -> Tensor:
        """A parameter with the features of all its axes but one merged.

        Inputs that merge add up; of outputs that merge the mean is taken.
        """
        x = self.parameters[model][name]
        x = x.to(accumulator_of(self.parameters[0]))
        for axis in {place.axis for _, place in self.places[name]} - {except_axis}:
            target, share = torch.arange(x.shape[axis]), torch.ones(x.shape[axis])
            for space, place in self.places[name]:
                if place.axis == axis:
                    mine = labels[space.name][model]
                    target[place.positions.flatten()] = place.positions[mine].flatten()
                    if place.role != "consumes":
                        each = 1 / torch.bincount(mine, minlength=space.size)[mine]
                        share[place.positions] = each[:, None]
            shape = [-1 if a == axis else 1 for a in range(x.ndim)]
            x = torch.zeros_like(x).index_add_(
                axis, target.to(x.device), x * share.view(shape).to(x)
            )
        return x
