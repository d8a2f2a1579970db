"""Sequence vectors of student and teacher flow in, an InfoNCE loss of each sequence flows out.

``N`` trained tokens, ``B`` sequences of a micro-batch, ``M`` sequences of the optimizer step, ``R`` rank of the cache's
projection. The teacher's vectors come from the cache, so those of the whole step are candidates for every micro-batch,
and how a step is cut up changes nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.stage_config import Negatives

_EPSILON = 1e-6  # keeps direction and gradient of a vector near zero finite


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherVectors:
    """The teacher's vectors of M sequences, and which these are; equal keys are the same sequence."""

    vectors: Tensor  # [M, R] float32
    keys: Tensor  # [M] int64
    domains: Tensor  # [M] int64, equal for sequences of the same domain


def sequence_means(values_NR: Tensor, sequence_N: Tensor, num: int) -> Tensor:
    """The mean of each of ``num`` sequences over its trained tokens, [num, R] float32; zeros for one without any."""
    values_NR = values_NR.float()
    sums_BR = values_NR.new_zeros(num, values_NR.shape[1]).index_add(0, sequence_N, values_NR)
    counts_B = torch.bincount(sequence_N, minlength=num).clamp(min=1)
    return sums_BR / counts_B.unsqueeze(1)


def contrastive_loss(
    student_BR: Tensor, own: TeacherVectors, candidates: TeacherVectors, *, temperature: float, negatives: Negatives
) -> Tensor:
    """InfoNCE (van den Oord, Li and Vinyals 2018) of each sequence i, [B] float32:

        -log [ exp(cos(s_i, t_i) / τ) / (exp(cos(s_i, t_i) / τ) + Σ_{j: key_j != key_i} exp(cos(s_i, t_j) / τ)) ]

    s are the student's vectors, t the teacher's. Candidates with the key of i are i itself or its duplicates, and do
    not count against it; nor, with the ``negatives`` of a domain alone, do those of other domains. Without any other
    candidate the loss is 0. No gradient flows to the teacher.
    """
    student_BR, teacher_BR = _unit(student_BR), _unit(own.vectors)
    own_B1 = (student_BR * teacher_BR).sum(1, keepdim=True) / temperature
    with torch.autocast(student_BR.device.type, enabled=False):  # which would round cosines to two digits
        others_BM = student_BR @ _unit(candidates.vectors).T / temperature
    passed_over_BM = own.keys.unsqueeze(1) == candidates.keys
    if negatives == "domain":
        passed_over_BM = passed_over_BM | (own.domains.unsqueeze(1) != candidates.domains)
    others_BM = others_BM.masked_fill(passed_over_BM, -torch.inf)
    return torch.cat([own_B1, others_BM], 1).logsumexp(1) - own_B1.squeeze(1)


def _unit(values_BR: Tensor) -> Tensor:
    values_BR = values_BR.float()
    return values_BR / (values_BR.square().sum(1, keepdim=True) + _EPSILON).sqrt()
