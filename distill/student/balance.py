"""Gradient norms of single losses flow in, the weights that training uses flow out."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.config import WeightsConfig

_SMOOTHING = 0.7  # part of the former norm in the new one
_MOST = 10.0  # a weight changes by this factor at most, so that a loss near its end is not blown up


def smoothed(former: Mapping[str, float] | None, measured: Mapping[str, float]) -> dict[str, float] | None:
    """``G ← s G + (1 - s) measured``, s = 0.7 and 0 the first time. What is not finite (float16) is not taken in."""
    if not all(math.isfinite(norm) for norm in measured.values()):
        return None if former is None else dict(former)
    if former is None:
        return dict(measured)
    return {name: _SMOOTHING * former[name] + (1 - _SMOOTHING) * norm for name, norm in measured.items()}


def balanced(weights: WeightsConfig, norms: Mapping[str, float] | None) -> WeightsConfig:
    """Weights with which loss i has the part w_i / Σ w of the gradient, as its weight w_i promises:

        e_i = w_i / G_i · Σ_j w_j G_j / Σ_j w_j,    w_i / 10 <= e_i <= 10 w_i

    G_i is the gradient norm of loss i alone. Without the bounds Σ e_i G_i = Σ w_i G_i, so the learning rate keeps its
    meaning. In the manner of GradNorm (Chen et al. 2018), solved instead of learned.
    """
    given = weights.model_dump()
    total = 0.0 if norms is None else sum(given[name] * norm for name, norm in norms.items())
    if norms is None or not total > 0:
        return weights
    mean = total / sum(given[name] for name in norms)
    factors = {name: mean / norm if norm > 0 else _MOST for name, norm in norms.items()}
    changed = {name: given[name] * min(max(factor, 1 / _MOST), _MOST) for name, factor in factors.items()}
    return weights.model_copy(update=changed)


def norm_of(gradients: Sequence[Tensor]) -> float:
    """The Euclidean norm of all of them together."""
    return float(torch.stack([gradient.float().norm() for gradient in gradients]).norm())
