"""Examples of an optimizer step flow in, the contrastive loss of its micro-batches flows out.

A sequence's vector is the mean over its trained tokens of its coordinates in the cache's projection, each weighed by √λ
as in ``losses.feature``; the student's coordinates come from its final hidden states by the learned map of the feature
loss. ``N`` trained tokens, ``B`` sequences, ``M`` candidates, ``R`` rank of the projection.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.cache.projection import Projection
from distill.stage_config import StageConfig
from distill.student.batch import DistillBatch, Example, collate
from distill.student.losses.contrastive import TeacherVectors, contrastive_loss, sequence_means
from distill.student.losses.feature import FeatureAdapter


def candidates_of(examples: Sequence[Example], projection: Projection, device: torch.device) -> TeacherVectors:
    """The teacher's vectors of the examples that have a trained token, one of which there must be."""
    batch = collate([example for example in examples if example.num_trained], projection)
    root_R = torch.from_numpy(projection.variance_R / projection.variance_R.sum()).float().sqrt()
    found = _vectors_of(batch, root_R)
    return TeacherVectors(
        vectors=found.vectors.to(device), keys=found.keys.to(device), domains=found.domains.to(device)
    )


def contrastive_sum(
    adapter: FeatureAdapter, hidden_ND: Tensor, batch: DistillBatch, candidates: TeacherVectors, *, stage: StageConfig
) -> Tensor:
    """``Σ_i n_i C_i`` over the batch's sequences, n_i the trained tokens of each, so that a mean is one over tokens."""
    num, root_R = len(batch.keys), adapter.get_buffer("weights_R").sqrt()
    losses_B = contrastive_loss(
        adapter.down(sequence_means(hidden_ND, batch.sequence, num)).float() * root_R,
        _vectors_of(batch, root_R),
        candidates,
        temperature=stage.contrastive_temperature,
        negatives=stage.contrastive_negatives,
    )
    return (losses_B * torch.bincount(batch.sequence, minlength=num)).sum()


def _vectors_of(batch: DistillBatch, root_R: Tensor) -> TeacherVectors:
    coords_NR = batch.coords
    assert coords_NR is not None, "there is a projection"
    means_MR = sequence_means(coords_NR, batch.sequence, len(batch.keys))
    return TeacherVectors(vectors=means_MR * root_R, keys=batch.keys, domains=batch.domains)
