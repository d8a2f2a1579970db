"""Queries and keys of teacher and student flow in, the distance of their attention maps flows out, for each query.

``N`` query positions of a sequence, ``L`` positions, ``H`` query heads, ``d`` head dimension, ``F`` rotary frequencies.
"""

from typing import Literal

import torch
from torch import Tensor

_HIDDEN = -1e9  # a score that leaves nothing of a position, and whose gradient stays finite


def turned(x_LHd: Tensor, positions_L: Tensor, inv_freq_F: Tensor, *, factor: float, interleaved: bool) -> Tensor:
    """The rotary embedding at ``positions``, as ``distill.cache.attention.rotate`` has it: [L, H, d]."""
    num = len(inv_freq_F)
    angle_L1F = (positions_L.to(inv_freq_F.dtype).unsqueeze(1) * inv_freq_F).unsqueeze(1)
    cos, sin = angle_L1F.cos() * factor, angle_L1F.sin() * factor
    turning, rest = x_LHd[..., : 2 * num], x_LHd[..., 2 * num :]
    pairs = turning.unflatten(-1, (num, 2)).unbind(-1) if interleaved else turning.unflatten(-1, (2, num)).unbind(-2)
    both = [pairs[0] * cos - pairs[1] * sin, pairs[1] * cos + pairs[0] * sin]
    joined = torch.stack(both, -1 if interleaved else -2).flatten(-2)
    return torch.cat([joined, rest], -1)


def log_map(
    q_NHd: Tensor, k_LHd: Tensor, positions_N: Tensor, *, scale: float, soft_cap: float | None, window: int | None
) -> Tensor:
    """Log of the causal attention probabilities, ``log softmax(cap(scale q k'))``: [H, N, L] float32 or wider.

    ``positions_N`` are those of the queries among the keys' positions 0 to L-1; a query sees its own and those before,
    the last ``window`` of them where there is one.
    """
    wide = torch.float64 if q_NHd.dtype == torch.float64 else torch.float32
    scores_HNL = torch.einsum("nhd,lhd->hnl", q_NHd.to(wide), k_LHd.to(wide)) * scale
    if soft_cap is not None:
        scores_HNL = soft_cap * torch.tanh(scores_HNL / soft_cap)
    distance_NL = positions_N.unsqueeze(1) - torch.arange(len(k_LHd), device=k_LHd.device)
    hidden_NL = distance_NL < 0
    if window is not None:
        hidden_NL |= distance_NL >= window
    return scores_HNL.masked_fill(hidden_NL, _HIDDEN).log_softmax(2)


def mean_map(log_map_HNL: Tensor) -> Tensor:
    """Log of the mean over heads, [1, N, L]."""
    return log_map_HNL.logsumexp(0, keepdim=True) - torch.tensor(float(len(log_map_HNL))).log()


def attention_distance(teacher_HNL: Tensor, student_HNL: Tensor, *, measure: Literal["kl", "mse"]) -> Tensor:
    """Distance of each query's row of the maps, given as logs, mean over heads: [N].

        kl     Σ_j t_j (log t_j - log s_j)
        mse    Σ_j (t_j - s_j)²                over the positions j that the query sees

    0 is its floor, which a student with the teacher's maps reaches; against maps that were rebuilt from int8 queries
    and keys even the teacher itself stays above it.
    """
    t_HNL = teacher_HNL.exp()
    if measure == "mse":
        return (t_HNL - student_HNL.exp()).square().sum(2).mean(0)
    return (t_HNL * (teacher_HNL - student_HNL)).sum(2).mean(0)
