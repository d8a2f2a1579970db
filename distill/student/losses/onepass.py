"""Logits of a chunk and its targets flow in, forward KL and cross-entropy with their gradient flow out, in one pass.

Autograd would keep half a dozen tensors of [N, V] for the two losses. Written out, the gradient of
w_kl T² KL + w_ce CE with respect to the logits is

    w_kl T (q_T Σp - p) + w_ce (q_1 - 1[label]),    q_T = softmax(z / T)

so the logits are read twice and the gradient is written once, in one compiled loop where there is a compiler. What
belongs to the few ids with a probability of their own is computed apart, in full precision, and put into its place.

``N`` tokens of the chunk, ``K`` ids with a probability of their own, ``V`` real vocabulary.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from distill.student.losses.kl import TeacherTargets, wide
from distill.student.losses.sampled import SampledTargets

_WORTH_COMPILING = 16384  # ids of a vocabulary: with fewer the compiler takes longer than it saves


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTargets:
    """What a chunk's tokens are compared with, and how much each loss counts; one of weight 0 is not computed.

    ``tail_logits`` plus ``tail_bias`` say how the mass outside the top-k is spread. The former is overwritten.
    """

    teacher: TeacherTargets | SampledTargets
    labels: Tensor  # [N] int64
    tail_logits: Tensor | None  # [N, V]
    tail_bias: Tensor | None  # [V]
    kl_weight: float
    ce_weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLosses:
    """Sums over a chunk's tokens, ``kl`` with T², and the gradient of their weighted sum."""

    kl: Tensor
    ce: Tensor
    gradient: Tensor  # [N, V], in the dtype asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """Ids with a probability of their own: the top-k, or what was drawn. ``neg_entropy`` is Σ p log p."""

    ids: Tensor  # [N, K]; an id may come twice
    p: Tensor  # [N, K], 0 where an id comes again
    at_id: Tensor  # [N, K], the probability of the id in its place
    neg_entropy: Tensor  # [N]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rest:
    """All other ids, and where their probability comes from."""

    logits: Tensor  # [N, V], -inf at the known ids
    bias: Tensor | None  # [V]
    log_mass: Tensor  # [N, 1]
    at_label: Tensor  # [N, 1], the logit of the label


def losses_with_gradient(logits_NV: Tensor, targets: ChunkTargets, *, dtype: torch.dtype) -> ChunkLosses:
    """``forward_kl`` (or ``sampled_kl``) and ``cross_entropy``, with the gradient as ``dtype``.

    Without tail logits the uncached ids are one bucket. That is the same as a tail in the shape of the student's own:
    for both Σ_tail p_i (log p_i - log q_i) is p_tail (log p_tail - log q_tail), and so is its gradient.
    """
    temperature, labels_N1 = targets.teacher.temperature, targets.labels.unsqueeze(1)
    known = _known(targets, wide(logits_NV[:0]).dtype)
    ids_NS = torch.cat([known.ids, labels_N1], 1)
    z_NS = wide(logits_NV.gather(1, ids_NS))
    rest = _rest(logits_NV, known, targets)
    sum_p_N1 = known.p.sum(1, keepdim=True) + (0.0 if rest is None else rest.log_mass.exp())
    scales_3 = z_NS.new_tensor([1 / temperature, targets.kl_weight * temperature, targets.ce_weight])
    run = _compiled() if _worth_compiling(logits_NV) else _one_pass
    others = None if rest is None else (rest.logits, rest.bias, rest.log_mass)
    gradient_NV, rows_NF = run(logits_NV, others, sum_p_N1, scales_3, dtype)
    top_N1, lse_N1, lse_at_one_N1, tail_kl_N1, offset_N1 = rows_NF.split(1, dim=1)
    x_NS = z_NS - top_N1
    is_label_NS = ids_NS == labels_N1
    p_label_N1 = (known.p * is_label_NS[:, :-1]).sum(1, keepdim=True)
    if rest is not None:
        is_other_N1 = ~is_label_NS[:, :-1].any(1, keepdim=True)
        # Where the label is a known id its own logit may be far above the rest's, and exp() infinite.
        p_rest_N1 = (rest.at_label / temperature + offset_N1).exp()
        p_label_N1 = p_label_N1 + torch.where(is_other_N1, p_rest_N1, 0.0)
    soft_NS = sum_p_N1 * (x_NS / temperature - lse_N1).exp() - torch.cat([known.at_id, p_label_N1], 1)
    hard_NS = (x_NS - lse_at_one_N1).exp() - is_label_NS.to(x_NS.dtype)
    gradient_NV.scatter_(1, ids_NS, (scales_3[1] * soft_NS + scales_3[2] * hard_NS).to(dtype))
    cross_N1 = sum_p_N1 * lse_N1 - (known.p * x_NS[:, :-1]).sum(1, keepdim=True) / temperature
    kl = (known.neg_entropy + (cross_N1 + tail_kl_N1).squeeze(1)).sum() * temperature**2
    ce = (lse_at_one_N1 - x_NS[:, -1:]).sum()
    return ChunkLosses(
        kl=kl if targets.kl_weight > 0 else torch.zeros_like(kl),
        ce=ce if targets.ce_weight > 0 else torch.zeros_like(ce),
        gradient=gradient_NV,
    )


def _known(targets: ChunkTargets, dtype: torch.dtype) -> _Known:
    teacher = targets.teacher
    if targets.kl_weight == 0:
        none_N0 = targets.labels.unsqueeze(1)[:, :0]
        p_N0 = none_N0.to(dtype)
        return _Known(ids=none_N0, p=p_N0, at_id=p_N0, neg_entropy=p_N0.sum(1))
    if isinstance(teacher, SampledTargets):
        p_NK = teacher.weights.to(dtype)
        at_id_NK = torch.where(p_NK > 0, p_NK, p_NK[:, :1])  # places past a row's ids repeat the first
        return _Known(ids=teacher.ids, p=p_NK, at_id=at_id_NK, neg_entropy=-teacher.entropy.to(dtype))
    log_p_NK = teacher.topk_log_p.to(dtype)
    p_NK = log_p_NK.exp()
    return _Known(ids=teacher.topk_ids, p=p_NK, at_id=p_NK, neg_entropy=(p_NK * log_p_NK).sum(1))


def _rest(logits_NV: Tensor, known: _Known, targets: ChunkTargets) -> _Rest | None:
    """None where nothing has probability but the known ids."""
    teacher = targets.teacher
    if targets.kl_weight == 0 or isinstance(teacher, SampledTargets) or known.ids.shape[1] == logits_NV.shape[1]:
        return None
    logits_NV = logits_NV.clone() if targets.tail_logits is None else targets.tail_logits
    at_label_N1 = wide(logits_NV.gather(1, targets.labels.unsqueeze(1)))
    if targets.tail_bias is not None:
        at_label_N1 = at_label_N1 + targets.tail_bias[targets.labels].unsqueeze(1)
    return _Rest(
        logits=logits_NV.scatter_(1, known.ids, -torch.inf),
        bias=targets.tail_bias,
        log_mass=teacher.log_tail.to(known.p.dtype).unsqueeze(1),
        at_label=at_label_N1,
    )


def _one_pass(
    z_NV: Tensor,
    rest: tuple[Tensor, Tensor | None, Tensor] | None,  # as in _Rest: logits, bias, log_mass
    sum_p_N1: Tensor,
    scales_3: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """All that needs the whole vocabulary: the gradient [N, V], right but at the known ids and the label, and [N, 5]:

    the largest logit; ``log Σ exp(x / T)`` and ``log Σ exp(x)``, x the logit less the largest; ``Σ p (log p - x / T)``
    over the other ids, and what takes their logits / T to log p. ``scales`` are 1 / T, w_kl T and w_ce.
    """
    x_NV = wide(z_NV)
    top_N1 = x_NV.amax(1, keepdim=True)
    x_NV = x_NV - top_N1
    xt_NV = x_NV * scales_3[0]
    lse_N1 = xt_NV.exp().sum(1, keepdim=True).log()
    lse_at_one_N1 = x_NV.exp().sum(1, keepdim=True).log()
    soft_NV = sum_p_N1 * (xt_NV - lse_N1).exp()
    tail_kl_N1 = offset_N1 = torch.zeros_like(top_N1)
    if rest is not None:
        rest_NV, bias_V, log_mass_N1 = rest
        u_NV = wide(rest_NV) if bias_V is None else wide(rest_NV) + bias_V
        u_NV = u_NV * scales_3[0]
        most_N1 = u_NV.amax(1, keepdim=True)
        offset_N1 = log_mass_N1 - most_N1 - (u_NV - most_N1).exp().sum(1, keepdim=True).log()
        log_p_NV = u_NV + offset_N1
        p_NV = log_p_NV.exp()
        tail_kl_N1 = torch.where(p_NV > 0, p_NV * (log_p_NV - xt_NV), 0.0).sum(1, keepdim=True)
        soft_NV = soft_NV - p_NV
    gradient_NV = scales_3[1] * soft_NV + scales_3[2] * (x_NV - lse_at_one_N1).exp()
    return gradient_NV.to(dtype), torch.cat([top_N1, lse_N1, lse_at_one_N1, tail_kl_N1, offset_N1], 1)


def _worth_compiling(logits_NV: Tensor) -> bool:
    """Whether the pass over the vocabulary can be built here: on a CPU by a C++ compiler, on a GPU by Triton."""
    if logits_NV.shape[1] < _WORTH_COMPILING or logits_NV.dtype == torch.float64:
        return False
    return logits_NV.is_cuda or (
        logits_NV.device.type == "cpu" and any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    )


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_one_pass, dynamic=True)
