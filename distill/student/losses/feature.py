"""States of the student and the cache's coordinates of the teacher's flow in, an error of each token flows out.

``N`` trained tokens, ``D`` the student's hidden size, ``R`` rank of the cache's projection, ``L`` inner layers that the
cache holds, ``B`` coordinates of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn

from distill.cache.inner import LEVELS_PER_DEVIATION
from distill.cache.projection import Projection

_QUANTILES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerStates:
    """Both sides' inner states at the trained tokens of a batch."""

    student: Mapping[int, Tensor]  # student's layer -> what goes into it, [N, D]
    teacher: Tensor  # [N, L, B] int8, as the cache holds it, layers rising
    at_start: Tensor  # [N] bool, at position 0 of a sequence


class FeatureAdapter(nn.Module):
    """The learned linear maps from the student's states to the teacher's coordinates: D -> R, and D -> B for each pair.

    ``pairs`` are the teacher's inner layers and the student's that learn from them; the projection has the former. It
    is trained with the student and kept in checkpoints, but is no part of the student.
    """

    def __init__(self, hidden_size: int, projection: Projection, pairs: Mapping[int, int] | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, projection.rank)
        self.pairs = dict(pairs or {})
        self._places = {layer: place for place, layer in enumerate(sorted(projection.layers))}
        self.inner = nn.ModuleDict(
            {f"layer{layer}": nn.Linear(hidden_size, len(projection.layers[layer].centre)) for layer in self.pairs}
        )
        # Inner states have no norm before them. Whatever their size, the loss begins at 1.
        for parameter in self.inner.parameters():
            nn.init.zeros_(parameter)
        weights = torch.from_numpy(projection.variance_R).float()
        self.register_buffer("weights_R", weights / weights.sum(), persistent=False)

    def forward(self, hidden_ND: Tensor, coords_NR: Tensor, inner: InnerStates | None = None) -> Tensor:
        """The mean of ``feature_loss`` and of each pair's ``inner_loss`` for each token, [N] float32.

        Without ``inner``, and at position 0, where inner states are not of the size of others, the former alone.
        """
        final_N = feature_loss(self.down(hidden_ND), coords_NR, self.get_buffer("weights_R"))
        if inner is None or not self.pairs:
            return final_N
        later_N = (~inner.at_start).nonzero().squeeze(1)
        parts = [
            inner_loss(self.inner[f"layer{ours}"](inner.student[theirs][later_N]), inner.teacher[later_N, place])
            for ours, theirs, place in ((ours, theirs, self._places[ours]) for ours, theirs in self.pairs.items())
        ]
        num = 1 + len(parts)
        shares_N = torch.ones_like(final_N).index_fill(0, later_N, 1 / num)
        return (final_N * shares_N).index_add(0, later_N, torch.stack(parts).sum(0) / num)


def feature_loss(predicted_NR: Tensor, coords_NR: Tensor, weights_R: Tensor) -> Tensor:
    """Normalised weighted squared error of each token, [N] float32:

        Σ_j λ_j (ĉ_j - c_j)² / Σ_j λ_j

    λ_j is the logit variance that coordinate j carries: each coordinate is weighed by √λ_j, which turns the whitened
    coordinates back to the scale of the teacher's logits. Coordinates have unit variance, so 1 is what the best
    constant reaches, and ``feature_floor`` (the quantisation noise of the targets) what a perfect student reaches.
    """
    # A sum of products, since autocast would make a matrix product of less precision.
    return ((predicted_NR.float() - coords_NR.float()).square() * weights_R).sum(1)


def inner_loss(predicted_NB: Tensor, levels_NB: Tensor) -> Tensor:
    """Normalised squared error of each token on a layer's coordinates, [N] float32:

        mean_j (û_j - u_j)²,   u = (c - centre) / (step · σ) = (q + 0.5) / σ

    q are the cached integers, of which the middle of their interval counts, and σ is the levels in a standard deviation
    (``LEVELS_PER_DEVIATION``), so that u of Gaussian coordinates has unit variance: 1 is what the best constant
    reaches, and ``inner_floor`` what a perfect student reaches.
    """
    target_NB = (levels_NB.float() + 0.5) / LEVELS_PER_DEVIATION
    return (predicted_NB.float() - target_NB).square().mean(1)


def inner_floor() -> float:
    """The inner loss of a student whose states tell the teacher's exactly, for Gaussian coordinates.

    E[(Q(x) - x)²],   x standard normal, Q the quantiser: 1 / (12 σ²), and about half as much again for what it clips
    """
    x = np.linspace(-8, 8, 2**16)  # clipped values are rare and far off: a few thousand quantiles would miss them
    levels = np.clip(np.floor(x * LEVELS_PER_DEVIATION), -128, 127)
    return float(np.average(np.square((levels + 0.5) / LEVELS_PER_DEVIATION - x), weights=np.exp(-(x**2) / 2)))


def feature_floor(projection: Projection) -> float:
    """The loss of a student whose coordinates equal the teacher's before quantisation, for Gaussian coordinates.

    Σ_j λ_j E[(Q(x) - x)²] / Σ_j λ_j,   x standard normal, Q the quantiser of coordinate j
    """
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((n + 0.5) / _QUANTILES) for n in range(_QUANTILES)], dtype=np.float32)
    coords_NR = np.repeat(quantiles[:, None], projection.rank, axis=1)
    error_NR = projection.dequantise(projection.quantise(coords_NR)) - coords_NR
    return float(np.average(np.square(error_NR).mean(axis=0), weights=projection.variance_R))
