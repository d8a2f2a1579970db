"""Ids that the teacher drew and student logits flow in, an estimate of KL(teacher || student) of each token flows out.

``N`` trained tokens, ``M`` different ids drawn at a position at most, ``V`` real vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.student.losses.kl import wide


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTargets:
    """What the teacher drew at N positions at T=1. Each row's ids are different, its places past them repeat the first.

    ``weights`` are counts over the number of draws, 0 past a row's ids; ``entropy`` is the teacher's, in nats.
    """

    ids: Tensor  # [N, M] int64
    weights: Tensor  # [N, M] float32
    entropy: Tensor  # [N] float32

    @staticmethod
    def of(ids_J: Tensor, counts_J: Tensor, entropy_N: Tensor) -> "SampledTargets":
        """Draws as a cache keeps them: position by position, and as many at each.

        ``ids_J`` and ``counts_J`` have J = Σ different ids. A position ends where the counts so far are a multiple of
        the number of draws, which is their sum over the number of positions.
        """
        num_tokens = len(entropy_N)
        num_samples = int(counts_J.sum()) // max(num_tokens, 1)
        position_J = torch.div(counts_J.long().cumsum(0) - 1, max(num_samples, 1), rounding_mode="floor")
        distinct_N = torch.bincount(position_J, minlength=num_tokens)
        first_N = distinct_N.cumsum(0) - distinct_N
        place_M = torch.arange(int(distinct_N.max()) if num_tokens else 0, device=ids_J.device)
        is_id_NM = place_M < distinct_N.unsqueeze(1)
        index_NM = torch.where(is_id_NM, first_N.unsqueeze(1) + place_M, first_N.unsqueeze(1))
        return SampledTargets(
            ids=ids_J.long()[index_NM],
            weights=torch.where(is_id_NM, counts_J.float()[index_NM] / num_samples, 0.0),
            entropy=entropy_N,
        )

    @property
    def temperature(self) -> float:
        """Draws at T=1 say nothing about other temperatures."""
        return 1.0

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "SampledTargets":
        """The targets on ``device``."""
        return SampledTargets(
            ids=self.ids.to(device, non_blocking=non_blocking),
            weights=self.weights.to(device, non_blocking=non_blocking),
            entropy=self.entropy.to(device, non_blocking=non_blocking),
        )

    def rows(self, start: int, stop: int) -> "SampledTargets":
        """The tokens ``start`` to ``stop``, the latter not included."""
        return SampledTargets(
            ids=self.ids[start:stop], weights=self.weights[start:stop], entropy=self.entropy[start:stop]
        )


def sampled_kl(logits_NV: Tensor, targets: SampledTargets) -> Tensor:
    """``-Σ_i w_i log q_i - H(p)`` of each token, [N], with q = softmax(z) and w the shares of the drawn ids.

    Draws from p make it an unbiased estimate of KL(p || q), and its gradient ``q - w`` one of ``q - p`` (Anshumann et
    al. 2025, random sampling knowledge distillation). Single tokens may be below 0.
    """
    z_NV = wide(logits_NV)
    drawn_N = (targets.weights.to(z_NV.dtype) * z_NV.gather(1, targets.ids)).sum(1)
    return z_NV.logsumexp(1) - drawn_N - targets.entropy.to(z_NV.dtype)
