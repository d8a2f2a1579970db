"""Gradient norms of single losses or domains flow in, the weights that training uses flow out."""

import math
from collections.abc import Mapping

_SMOOTHING = 0.7  # part of the former norm in the new one
_MOST = 10.0  # a weight changes by this factor at most, so that a loss near its end is not blown up


def smoothed(former: Mapping[str, float] | None, measured: Mapping[str, float]) -> dict[str, float] | None:
    """``G ← s G + (1 - s) measured``, s = 0.7 and 0 the first time; what was not measured stays.

    Where something measured is not finite (float16), nothing is taken in.
    """
    if not all(math.isfinite(norm) for norm in measured.values()):
        return None if former is None else dict(former)
    known = {} if former is None else dict(former)
    new = {name: _SMOOTHING * known.get(name, norm) + (1 - _SMOOTHING) * norm for name, norm in measured.items()}
    return {**known, **new}


def balanced(weights: Mapping[str, float], norms: Mapping[str, float] | None) -> dict[str, float]:
    """Weights with which part i has the part w_i / Σ w of the gradient, as its weight w_i promises:

        e_i = w_i / G_i · Σ_j w_j G_j / Σ_j w_j,    w_i / 10 <= e_i <= 10 w_i

    G_i is the gradient norm of part i alone; sums run over the parts whose norm is known, and others keep their weight.
    Without the bounds Σ e_i G_i = Σ w_i G_i, so the learning rate keeps its meaning. In the manner of GradNorm (Chen et
    al. 2018), solved instead of learned.
    """
    known = {name: (norms or {})[name] for name, weight in weights.items() if weight > 0 and name in (norms or {})}
    total = sum(weights[name] * norm for name, norm in known.items())
    if not total > 0:
        return dict(weights)
    mean = total / sum(weights[name] for name in known)
    factors = {name: mean / norm if norm > 0 else _MOST for name, norm in known.items()}
    return {name: w * min(max(factors.get(name, 1.0), 1 / _MOST), _MOST) for name, w in weights.items()}
