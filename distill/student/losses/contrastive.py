"""Sequence vectors of student and teacher flow in, an InfoNCE loss of each sequence flows out.

``N`` trained tokens, ``B`` sequences of a micro-batch, ``M`` sequences of the optimizer step, ``R`` rank of the cache's
projection. The teacher's vectors come from the cache, so those of the whole step are candidates for every micro-batch,
and how a step is cut up changes nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_EPSILON = 1e-6  # keeps direction and gradient of a vector near zero finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The teacher's vectors that a student's vector is told apart from; equal keys are the same sequence.

    With ``domains`` a vector is told apart from those of its own domain only.
    """

    vectors: Tensor  # [M, R] float32
    keys: Tensor  # [M] int64
    domains: Tensor | None = None  # [M] int64


def sequence_means(values_NR: Tensor, sequence_N: Tensor, num: int) -> Tensor:
    """The mean of each of ``num`` sequences over its trained tokens, [num, R] float32; zeros for one without any."""
    values_NR = values_NR.float()
    sums_BR = values_NR.new_zeros(num, values_NR.shape[1]).index_add(0, sequence_N, values_NR)
    counts_B = torch.bincount(sequence_N, minlength=num).clamp(min=1)
    return sums_BR / counts_B.unsqueeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """The teacher's vectors of the sequences of a micro-batch, and which they are."""

    vectors: Tensor  # [B, R] float32
    keys: Tensor  # [B] int64
    domains: Tensor  # [B] int64, equal for sequences of the same domain


def contrastive_loss(student_BR: Tensor, own: Own, candidates: Candidates, *, temperature: float) -> Tensor:
    """InfoNCE (van den Oord, Li and Vinyals 2018) of each sequence i, [B] float32:

        -log [ exp(cos(s_i, t_i) / τ) / (exp(cos(s_i, t_i) / τ) + Σ_{j: key_j != key_i} exp(cos(s_i, t_j) / τ)) ]

    s are the student's vectors, t the teacher's. Candidates with the key of i are i itself or its duplicates, and do
    not count against it; nor do those of other domains where ``candidates.domains`` are given. Without any other
    candidate the loss is 0. No gradient flows to the teacher.
    """
    student_BR, teacher_BR = _unit(student_BR), _unit(own.vectors)
    own_B1 = (student_BR * teacher_BR).sum(1, keepdim=True) / temperature
    with torch.autocast(student_BR.device.type, enabled=False):  # which would round cosines to two digits
        others_BM = student_BR @ _unit(candidates.vectors).T / temperature
    passed_over_BM = own.keys.unsqueeze(1) == candidates.keys
    if candidates.domains is not None:
        passed_over_BM = passed_over_BM | (own.domains.unsqueeze(1) != candidates.domains)
    others_BM = others_BM.masked_fill(passed_over_BM, -torch.inf)
    return torch.cat([own_B1, others_BM], 1).logsumexp(1) - own_B1.squeeze(1)


def _unit(values_BR: Tensor) -> Tensor:
    values_BR = values_BR.float()
    return values_BR / (values_BR.square().sum(1, keepdim=True) + _EPSILON).sqrt()
