"""Final hidden states of the student and the cache's coordinates flow in, a weighted error of each token flows out.

``N`` trained tokens, ``D`` the student's hidden size, ``R`` rank of the cache's projection.
"""

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn

from distill.cache.projection import Projection

_QUANTILES = 4096


class FeatureAdapter(nn.Module):
    """The learned linear map from the student's final hidden state to the teacher's coordinates, D -> R.

    It is trained with the student and kept in checkpoints, but is no part of the student.
    """

    def __init__(self, hidden_size: int, projection: Projection) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, projection.rank)
        weights = torch.from_numpy(projection.variance_R).float()
        self.register_buffer("weights_R", weights / weights.sum(), persistent=False)

    def forward(self, hidden_ND: Tensor, coords_NR: Tensor) -> Tensor:
        """``feature_loss`` of each token, [N] float32."""
        weights_R = self.get_buffer("weights_R")
        return feature_loss(self.down(hidden_ND), coords_NR, weights_R)


def feature_loss(predicted_NR: Tensor, coords_NR: Tensor, weights_R: Tensor) -> Tensor:
    """Normalised weighted squared error of each token, [N] float32:

        Σ_j λ_j (ĉ_j - c_j)² / Σ_j λ_j

    λ_j is the logit variance that coordinate j carries: each coordinate is weighed by √λ_j, which turns the whitened
    coordinates back to the scale of the teacher's logits. Coordinates have unit variance, so 1 is what the best
    constant reaches, and ``feature_floor`` (the quantisation noise of the targets) what a perfect student reaches.
    """
    return (predicted_NR.float() - coords_NR.float()).square() @ weights_R


def feature_floor(projection: Projection) -> float:
    """The loss of a student whose coordinates equal the teacher's before quantisation, for Gaussian coordinates.

    Σ_j λ_j E[(Q(x) - x)²] / Σ_j λ_j,   x standard normal, Q the quantiser of coordinate j
    """
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((n + 0.5) / _QUANTILES) for n in range(_QUANTILES)], dtype=np.float32)
    coords_NR = np.repeat(quantiles[:, None], projection.rank, axis=1)
    error_NR = projection.dequantise(projection.quantise(coords_NR)) - coords_NR
    return float(np.average(np.square(error_NR).mean(axis=0), weights=projection.variance_R))
