"""ZipIt's `metric_calculators` on `mergekern.Covariance`: the same names and signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...ops.covariance import Covariance


def compute_correlation(covariance: Tensor, eps: float = 1e-7) -> Tensor:
    """R[i, j] = C[i, j] / max(s_i s_j, eps), s the square roots of the diagonal.

    The bits of the original, in the dtype of the covariance.

    >>> import torch
    >>> compute_correlation(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    std = covariance.diagonal().sqrt()
    return covariance / torch.outer(std, std).clamp_(min=eps)


class CovarianceMetric:
    """The covariance of the features of all models over all batches, each weighed by its images.

    update(images, *features): one [C, S] tensor of each model, S samples of `images` images.
    finalize(images in all): float32 [N C, N C].
    Sums are float64 and centred (see `Covariance`), where the original subtracts the product of
    float32 means and stops in a debugger when a variance comes out negative. As there, NaN and
    infinities count as 0. Its `std`, `mean` and `outer`, which nothing reads, are not kept.

    >>> import torch
    >>> metric = CovarianceMetric()
    >>> metric.update(2, torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 4.0]]))
    >>> metric.finalize(2)
    tensor([[1., 2.],
            [2., 4.]])
    """

    name = "covariance"

    def __init__(self) -> None:
        # By samples of an image, which count for less where an image has more of them.
        self._moments: dict[float, Covariance] = {}
        self._images: dict[float, int] = {}

    def update(self, batch_size: int, *feats: Tensor, **aux_params: Any) -> None:
        rows = [x.T for x in feats]
        per_image = len(rows[0]) / batch_size
        if per_image not in self._moments:
            width = sum(x.shape[1] for x in rows)
            self._moments[per_image] = Covariance(width, device=rows[0].device, nan="zero")
            self._images[per_image] = 0
        self._moments[per_image].update(rows)
        self._images[per_image] += batch_size

    def finalize(self, numel: int, eps: float = 1e-4) -> Tensor:
        seen = sum(self._images.values())
        if numel != seen:
            raise ArgumentError.of("CovarianceMetric", "images do not add up", numel, seen)
        shares = [(m, self._images[k] / seen) for k, m in self._moments.items()]
        mean = torch.stack([share * m.mean for m, share in shares]).sum(0)
        total = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
        for m, share in shares:
            total.add_(m.covariance(), alpha=share)
            total.addr_(m.mean - mean, m.mean - mean, alpha=share)
        return total.float()
