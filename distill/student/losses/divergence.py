"""A teacher's cached targets and student logits flow in, the divergence that a stage asks for flows out, of each token.

``N`` trained tokens, ``K`` cached ids, ``V`` real vocabulary, ``C`` categories: V with a low-rank tail, K + 1 with a
bucket. Everything is computed in float32 (float64 stays float64) whatever the dtype of the logits.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import DivergenceName, StageConfig
from distill.student.losses.kl import TeacherTargets, bucket_log_probs, forward_kl, low_rank_log_probs, wide

_DEFAULT_BETA: dict[DivergenceName, float] = {"js": 0.5, "skew": 0.1}  # as in the papers named below


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """T² D(p, q) of teacher p and student q = softmax(z / T), called as ``forward_kl`` is; ``m = β p + (1 - β) q``.

        forward    KL(p || q)
        reverse    KL(q || p)
        js         β KL(p || m) + (1 - β) KL(q || m)     generalised Jensen-Shannon (Lin 1991; Agarwal et al. 2024)
        skew       KL(p || m)                            skew divergence (Lee 2001; Ko et al. 2024)

    with KL(a || b) = Σ_i a_i (log a_i - log b_i) over the categories that ``tail`` leaves: the whole vocabulary, or the
    cached ids and one bucket. As in ``forward_kl`` T² is inside, and the rounded p is used as it is. All but
    ``forward`` keep a few more [N, V] tensors for the backward pass.
    """

    name: DivergenceName = "forward"
    beta: float = 0.5  # the teacher's part in m

    @staticmethod
    def of(stage: StageConfig) -> "Divergence":
        """The stage's divergence; β is 0.5 for js and 0.1 for skew where the stage does not say."""
        beta = _DEFAULT_BETA.get(stage.divergence, 0.5) if stage.beta is None else stage.beta
        return Divergence(name=stage.divergence, beta=beta)

    def __call__(self, logits_NV: Tensor, targets: TeacherTargets, tail_logits_NV: Tensor | None) -> Tensor:
        """[N]; arguments as in ``forward_kl``."""
        if self.name == "forward":
            return forward_kl(logits_NV, targets, tail_logits_NV)
        log_p_NC, log_q_NC = _log_probs(wide(logits_NV) / targets.temperature, targets, tail_logits_NV)
        return self._between(log_p_NC, log_q_NC) * targets.temperature**2

    def _between(self, log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
        if self.name == "reverse":
            return _kl(log_q_NC, log_p_NC)
        log_m_NC = torch.logaddexp(log_p_NC + math.log(self.beta), log_q_NC + math.log1p(-self.beta))
        if self.name == "skew":
            return _kl(log_p_NC, log_m_NC)
        return self.beta * _kl(log_p_NC, log_m_NC) + (1 - self.beta) * _kl(log_q_NC, log_m_NC)


def _kl(log_a_NC: Tensor, log_b_NC: Tensor) -> Tensor:
    return (log_a_NC.exp() * (log_a_NC - log_b_NC)).sum(1)


def _log_probs(z_NV: Tensor, targets: TeacherTargets, tail_logits_NV: Tensor | None) -> tuple[Tensor, Tensor]:
    """``log p`` and ``log q`` over the categories: [N, C] each."""
    if tail_logits_NV is not None:
        return low_rank_log_probs(tail_logits_NV, targets), z_NV.log_softmax(1)
    log_p_NK = targets.topk_log_p.to(z_NV.dtype)
    log_q_NK, log_q_tail_N = bucket_log_probs(z_NV, targets)
    if log_q_tail_N is None:
        return log_p_NK, log_q_NK
    log_p_tail_N1 = targets.log_tail.to(z_NV.dtype).unsqueeze(1)
    return torch.cat([log_p_NK, log_p_tail_N1], 1), torch.cat([log_q_NK, log_q_tail_N.unsqueeze(1)], 1)


FORWARD = Divergence()
