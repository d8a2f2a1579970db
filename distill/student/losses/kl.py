"""A teacher's cached targets and student logits flow in, KL(teacher || student) of each token flows out.

The other divergences are in ``losses.divergence``.

``N`` trained tokens, ``K`` cached ids, ``V`` real vocabulary. Everything is computed in float32 (float64 stays
float64) whatever the dtype of the logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTargets:
    """What the teacher left for N tokens at one temperature T.

    ``topk_log_p`` is ``log p_T`` of the cached ids, ``topk_logprobs / T - log_z[T]``; ``log_tail`` is the log of
    the mass of all other ids.
    """

    topk_ids: Tensor  # [N, K] int64
    topk_log_p: Tensor  # [N, K] float32
    log_tail: Tensor  # [N] float32
    temperature: float

    def rows(self, start: int, stop: int) -> "TeacherTargets":
        """The tokens ``start`` to ``stop``, the latter not included."""
        return TeacherTargets(
            topk_ids=self.topk_ids[start:stop],
            topk_log_p=self.topk_log_p[start:stop],
            log_tail=self.log_tail[start:stop],
            temperature=self.temperature,
        )


def wide(values: Tensor) -> Tensor:
    """``values`` in float32, or in float64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


def forward_kl(logits_NV: Tensor, targets: TeacherTargets, tail_logits_NV: Tensor | None) -> Tensor:
    """T² KL(p || q) of each token, [N], with q = softmax(z / T) of the student's logits z.

    Over the whole vocabulary when ``tail_logits_NV`` says how the teacher's tail is shaped (``tail: low_rank``):

        T² Σ_i p_i (log p_i - log q_i),    p_i = exp(topk_log_p_i)                        i cached
                                           p_i = exp(log_tail) softmax_uncached(u / T)_i   else, u the tail logits

    Without it (``tail: bucket``) the uncached ids are one category, K + 1 in all; q_tail is their exact sum:

        T² [ Σ_cached p_i (log p_i - log q_i) + p_tail (log p_tail - log q_tail) ]

    The cached numbers are rounded, so Σ p is 1 within about 1e-3; it is used as it is. T² keeps the size of the
    gradient comparable between temperatures (Hinton, Vinyals and Dean 2015, section 2).
    """
    z_NV = wide(logits_NV)
    z_NV = z_NV / targets.temperature if targets.temperature != 1.0 else z_NV
    if tail_logits_NV is None:
        kl_N = _bucket_kl(z_NV, targets)
    else:
        kl_N = _dense_kl(z_NV, low_rank_log_probs(tail_logits_NV, targets))
    return kl_N * targets.temperature**2


def low_rank_log_probs(tail_logits_NV: Tensor, targets: TeacherTargets) -> Tensor:
    """``log p`` of the teacher over the whole vocabulary: cached ids exact, the tail's mass spread by its logits.

    ``softmax((B c + b) / T)`` over the uncached ids, scaled to ``exp(log_tail)``. No gradient flows.
    """
    with torch.no_grad():
        u_NV = wide(tail_logits_NV) / targets.temperature
        num_cached, num_vocab = targets.topk_ids.shape[1], u_NV.shape[1]
        if num_cached < num_vocab:
            u_NV.scatter_(1, targets.topk_ids, -torch.inf)
            u_NV += (targets.log_tail.to(u_NV.dtype) - u_NV.logsumexp(1)).unsqueeze(1)
        return u_NV.scatter_(1, targets.topk_ids, targets.topk_log_p.to(u_NV.dtype))


def _dense_kl(z_NV: Tensor, log_p_NV: Tensor) -> Tensor:
    """Σ p (log p - log q) with log q = z - lse(z); overwrites ``log_p_NV``.

    Written so that log q is never kept for the backward pass: each [N, V] tensor less is a larger chunk.
    """
    p_NV = log_p_NV.exp()
    return (p_NV * log_p_NV.sub_(z_NV)).sum(1) + p_NV.sum(1) * z_NV.logsumexp(1)


def bucket_log_probs(z_NV: Tensor, targets: TeacherTargets) -> tuple[Tensor, Tensor | None]:
    """``log q`` of the cached ids, [N, K], and of all others together, [N]; None where every id is cached."""
    lse_N = z_NV.logsumexp(1)
    log_q_NK = z_NV.gather(1, targets.topk_ids) - lse_N.unsqueeze(1)
    if log_q_NK.shape[1] == z_NV.shape[1]:
        return log_q_NK, None
    # A sum over the uncached ids, since 1 - Σ q_cached cancels when little mass is left.
    return log_q_NK, z_NV.scatter(1, targets.topk_ids, -torch.inf).logsumexp(1) - lse_N


def _bucket_kl(z_NV: Tensor, targets: TeacherTargets) -> Tensor:
    log_p_NK = targets.topk_log_p.to(z_NV.dtype)
    log_q_NK, log_q_tail_N = bucket_log_probs(z_NV, targets)
    kl_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(1)
    if log_q_tail_N is None:
        return kl_N
    log_p_tail_N = targets.log_tail.to(z_NV.dtype)
    return kl_N + log_p_tail_N.exp() * (log_p_tail_N - log_q_tail_N)
