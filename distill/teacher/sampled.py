"""Logits flow in, ids drawn from the teacher's distribution at temperature 1 flow out.

Random Sampling KD (Anshumann et al., 2025, "Sparse Logit Sampling") trains on such draws: their counts are an unbiased
estimate of the distribution, tail included, in a few tens of bytes.

A draw depends on its sequence, position and number alone, so the same sequence gives the same draws in whatever batch
it runs. N positions, V ids of this rank's slice, S draws.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 64
# Odd multipliers of SplitMix64 (Steele, Lea, Flood 2014) and of a linear congruential generator, as signed integers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_POSITION = 0xD1342543DE82EF95 - 2**64


def keys(seed: int, start: int, stop: int) -> NDArray[np.int64]:
    """One key for each of a sequence's positions from ``start`` to ``stop``: int64 [stop - start]."""
    with np.errstate(over="ignore"):
        mixed: NDArray[np.int64] = np.int64(seed) + np.arange(start, stop) * np.int64(_POSITION)
    return mixed


def uniforms(keys_N: Tensor, num: int, *, lane: int) -> Tensor:
    """Float64 [N, num] in [0, 1) that depend on key, number and lane alone: SplitMix64 as a counter's hash."""
    counter_S = torch.arange(1 + lane * num, 1 + (lane + 1) * num, device=keys_N.device)
    mixed_NS = keys_N[:, None] + counter_S * _STEP
    for shift, factor in zip((30, 27), _MIX, strict=True):
        mixed_NS = (mixed_NS ^ _shifted(mixed_NS, shift)) * factor
    return _shifted(mixed_NS ^ _shifted(mixed_NS, 31), 11).double() * 2.0**-53


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def draw(logits_NV: Tensor, uniforms_NS: Tensor) -> Tensor:
    """Draws from softmax(logits): int64 [N, S] indices into V.

    The cumulative sum is taken over blocks and then inside the block that a number falls into, both in float64: over a
    whole vocabulary in float32 the smallest probabilities would vanish.
    """
    num_rows, width = logits_NV.shape
    weights_NV = logits_NV.float()
    weights_NV = torch.exp(weights_NV - weights_NV.amax(1, keepdim=True))
    weights_NV = torch.nn.functional.pad(weights_NV, (0, -width % _BLOCK))
    blocks_NBC = weights_NV.unflatten(1, (-1, _BLOCK))
    ends_NB = blocks_NBC.sum(2, dtype=torch.float64).cumsum(1)
    wanted_NS = uniforms_NS * ends_NB[:, -1:]
    block_NS = torch.searchsorted(ends_NB, wanted_NS, right=True).clamp(max=ends_NB.shape[1] - 1)
    before_NS = torch.where(block_NS > 0, ends_NB.gather(1, (block_NS - 1).clamp(min=0)), 0.0)
    rows_N1 = torch.arange(num_rows, device=logits_NV.device)[:, None]
    inside_NSC = blocks_NBC[rows_N1, block_NS].double().cumsum(2)
    # By rounding a number may lie just past its block's end: the last id with any weight takes it.
    last_NS1 = inside_NSC[:, :, -1:] * (1 - 1e-15)
    place_NS1 = torch.minimum((wanted_NS - before_NS).unsqueeze(2), last_NS1)
    inner_NS = torch.searchsorted(inside_NSC, place_NS1, right=True)[:, :, 0].clamp(max=_BLOCK - 1)
    return block_NS * _BLOCK + inner_NS


def choose(drawn_PNS: Tensor, log_mass_NP: Tensor, uniforms_NS: Tensor) -> Tensor:
    """Of every vocabulary slice's own draws, the one of the slice that the number falls into: int64 [N, S]."""
    share_NP = torch.softmax(log_mass_NP.double(), dim=1).cumsum(1)
    slice_NS = torch.searchsorted(share_NP, uniforms_NS, right=True).clamp(max=share_NP.shape[1] - 1)
    return drawn_PNS.gather(0, slice_NS[None])[0]
