"""Examples of an optimizer step flow in, the contrastive loss of its micro-batches flows out.

A sequence's vector is the mean over its trained tokens of its coordinates in the cache's projection, each weighed by √λ
as in ``losses.feature``; the student's coordinates come from its final hidden states by the learned map of the feature
loss. ``N`` trained tokens, ``B`` sequences, ``M`` candidates, ``R`` rank of the projection.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.cache.projection import Projection
from distill.stage_config import Negatives
from distill.student.batch import DistillBatch, Example, collate
from distill.student.losses.contrastive import Candidates, Own, contrastive_loss, sequence_means
from distill.student.losses.feature import FeatureAdapter


def candidates_of(
    examples: Sequence[Example], projection: Projection, device: torch.device, *, negatives: Negatives
) -> Candidates:
    """The teacher's vectors of the examples that have a trained token, one of which there must be.

    ``negatives`` says whether a sequence is told apart from those of all domains or of its own only.
    """
    batch = collate([example for example in examples if example.num_trained], projection)
    coords_NR = batch.coords
    assert coords_NR is not None, "there is a projection"
    root_R = torch.from_numpy(projection.variance_R / projection.variance_R.sum()).float().sqrt()
    vectors_MR = sequence_means(coords_NR, batch.sequence, len(batch.keys)) * root_R
    domains_M = batch.domains.to(device) if negatives == "domain" else None
    return Candidates(vectors=vectors_MR.to(device), keys=batch.keys.to(device), domains=domains_M)


def contrastive_sum(
    adapter: FeatureAdapter, hidden_ND: Tensor, batch: DistillBatch, candidates: Candidates, *, temperature: float
) -> Tensor:
    """``Σ_i n_i C_i`` over the batch's sequences, n_i the trained tokens of each, so that a mean is one over tokens."""
    coords_NR, num = batch.coords, len(batch.keys)
    assert coords_NR is not None, "there is a projection"
    root_R = adapter.get_buffer("weights_R").sqrt()
    student_BR = adapter.down(sequence_means(hidden_ND, batch.sequence, num)).float() * root_R
    teacher_BR = sequence_means(coords_NR, batch.sequence, num) * root_R
    own = Own(vectors=teacher_BR, keys=batch.keys, domains=batch.domains)
    losses_B = contrastive_loss(student_BR, own, candidates, temperature=temperature)
    return (losses_B * torch.bincount(batch.sequence, minlength=num)).sum()
