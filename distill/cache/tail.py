"""Cached targets of N positions flow in, the teacher's distribution that they stand for flows out, in float64.

This is the reference: reports measure with it, and the faster code of a trainer is tested against it.

``N`` positions, ``K`` top-k, ``V`` vocabulary.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["low_rank", "bucket", "renormalised"]


def rebuild(
    kind: Kind,
    *,
    temperature: float,
    topk_ids_NK: NDArray[np.int32],
    topk_logprobs_NK: NDArray[np.floating],
    log_z_N: NDArray[np.floating],
    log_tail_N: NDArray[np.floating],
    tail_logits_NV: NDArray[np.floating],
) -> NDArray[np.float64]:
    """Probabilities over the vocabulary at ``temperature``: [N, V].

    The cached ids have ``exp(logprob / T - log_z)``. The mass ``exp(log_tail)`` goes to the other ids:

    - ``low_rank``: in the shape of ``softmax(tail_logits / T)`` over them;
    - ``bucket``: evenly.

    ``renormalised`` drops the tail and spreads ``softmax(logprobs / T)`` over the cached ids; it is here to be compared
    with, no loss may use it. Only ``low_rank`` reads the values of ``tail_logits_NV``; the others read its shape.
    """
    scaled_NK = np.asarray(topk_logprobs_NK, np.float64) / temperature
    if kind == "renormalised":
        probs_NV: NDArray[np.float64] = np.zeros(tail_logits_NV.shape)
        np.put_along_axis(probs_NV, topk_ids_NK, _softmax(scaled_NK), axis=1)
        return probs_NV
    shape_NV = (
        np.zeros(tail_logits_NV.shape) if kind == "bucket" else np.array(tail_logits_NV, np.float64) / temperature
    )
    np.put_along_axis(shape_NV, topk_ids_NK, -np.inf, axis=1)
    probs_NV = _softmax(shape_NV)
    probs_NV *= np.exp(np.asarray(log_tail_N, np.float64))[:, None]
    cached_NK = np.exp(scaled_NK - np.asarray(log_z_N, np.float64)[:, None])
    np.put_along_axis(probs_NV, topk_ids_NK, cached_NK, axis=1)
    return probs_NV


def total_variation(probs_NV: NDArray[np.float64], others_NV: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half the summed absolute difference of two distributions at each position: [N] in [0, 1]."""
    return np.asarray(0.5 * np.abs(probs_NV - others_NV).sum(axis=1))


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(values - values.max(axis=1, keepdims=True))
    normalised: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalised
