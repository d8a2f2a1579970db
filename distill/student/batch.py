"""Cached sequences flow in, padded batches of tensors flow out, with targets for the trained tokens only.

    SequenceTargets -> Example (cut, trained positions only) -> DistillBatch -> student and losses

Target t belongs to the hidden state at position t and describes the token at t + 1: the cache made the shift, and
nothing here shifts again. ``B`` sequences, ``S`` padded length, ``N`` trained tokens of the batch, ``K`` top-k,
``T`` temperatures of the cache, ``R`` rank of its projection.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache.projection import Projection
from distill.records import SequenceTargets
from distill.student.losses.kl import TeacherTargets

NO_GROUP = "(none)"  # of rows that lack the metadata key


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence as training needs it, cut and with the targets of its n trained positions; copies, no views."""

    domain: str
    input_ids: NDArray[np.int32]  # [S]
    positions: NDArray[np.int64]  # [n], below S - 1
    topk_ids: NDArray[np.int32]  # [n, K]
    topk_logprobs: NDArray[np.float32]  # [n, K]
    log_z: NDArray[np.float32]  # [n, T]
    log_tail: NDArray[np.float32]  # [n, T]
    hidden: dict[int, NDArray[np.int8]]  # bits -> [n, r_bits]
    group: str | None = None  # of a metadata key, where rows are told apart by one

    @property
    def num_trained(self) -> int:
        """Tokens that count in a loss; 0 where the cut left none."""
        return len(self.positions)


def group_of(metadata: Mapping[str, str], key: str) -> str:
    """The value that a row has for a metadata key."""
    return metadata.get(key, NO_GROUP)


def example_of(sequence: SequenceTargets, max_length: int, *, group_by: str | None = None) -> Example:
    """The first ``max_length`` tokens and their trained targets, which in a causal model no later token changes."""
    prompt, targets = sequence.prompt, sequence.targets
    positions = np.flatnonzero(prompt.loss_mask[: max_length - 1])
    return Example(
        domain=prompt.domain,
        input_ids=prompt.input_ids[:max_length].copy(),
        positions=positions,
        topk_ids=targets.topk_ids[positions],
        topk_logprobs=targets.topk_logprobs[positions],
        log_z=targets.log_z[positions],
        log_tail=targets.log_tail[positions],
        hidden={bits: values[positions] for bits, values in targets.hidden.items()},
        group=None if group_by is None else group_of(prompt.metadata, group_by),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillBatch:
    """Padded sequences and, flattened over them, the targets of their trained tokens."""

    input_ids: Tensor  # [B, S] int64, padded on the right
    attention_mask: Tensor  # [B, S] int64, 1 where there is a token
    trained: Tensor  # [N] int64, indices into the flattened [B S]
    labels: Tensor  # [N] int64, the token after each trained position
    topk_ids: Tensor  # [N, K] int64
    topk_logprobs: Tensor  # [N, K] float32
    log_z: Tensor  # [N, T] float32
    log_tail: Tensor  # [N, T] float32
    coords: Tensor | None  # [N, R] float32
    sequence: Tensor  # [N] int64, the sequence of each trained token
    keys: Tensor  # [B] int64, equal for sequences with the same tokens and trained positions

    @property
    def num_trained(self) -> int:
        """N."""
        return len(self.labels)

    def to(self, device: torch.device) -> "DistillBatch":
        """The batch on ``device``."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            values = getattr(self, field.name)
            moved[field.name] = None if values is None else values.to(device, non_blocking=True)
        return replace(self, **moved)

    def teacher(self, temperature: float, index: int) -> TeacherTargets:
        """The teacher's targets at a temperature, whose column in ``log_z`` and ``log_tail`` is ``index``."""
        return TeacherTargets(
            topk_ids=self.topk_ids,
            topk_log_p=self.topk_logprobs / temperature - self.log_z[:, index, None],
            log_tail=self.log_tail[:, index],
            temperature=temperature,
        )


def collate(examples: Sequence[Example], projection: Projection | None) -> DistillBatch:
    """One padded batch. Coordinates of hidden states are dequantised where there is a projection."""
    num_padded = max(len(example.input_ids) for example in examples)
    input_ids_BS = np.zeros((len(examples), num_padded), np.int64)
    attention_mask_BS = np.zeros((len(examples), num_padded), np.int64)
    for row, example in enumerate(examples):
        input_ids_BS[row, : len(example.input_ids)] = example.input_ids
        attention_mask_BS[row, : len(example.input_ids)] = 1
    trained = [example.positions + row * num_padded for row, example in enumerate(examples)]
    labels = [example.input_ids[example.positions + 1] for example in examples]
    return DistillBatch(
        input_ids=torch.from_numpy(input_ids_BS),
        attention_mask=torch.from_numpy(attention_mask_BS),
        trained=torch.from_numpy(np.concatenate(trained)),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        topk_ids=torch.from_numpy(np.concatenate([example.topk_ids for example in examples]).astype(np.int64)),
        topk_logprobs=torch.from_numpy(np.concatenate([example.topk_logprobs for example in examples])),
        log_z=torch.from_numpy(np.concatenate([example.log_z for example in examples])),
        log_tail=torch.from_numpy(np.concatenate([example.log_tail for example in examples])),
        coords=None if projection is None else torch.from_numpy(_coords(examples, projection)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(examples)), [example.num_trained for example in examples])),
        keys=torch.tensor([_key(example) for example in examples]),
    )


def _key(example: Example) -> int:
    digest = hashlib.blake2b(example.input_ids.tobytes(), digest_size=8)
    digest.update(example.positions.tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _coords(examples: Sequence[Example], projection: Projection) -> NDArray[np.float32]:
    widths = [bits for bits, _ in projection.widths]
    return projection.dequantise(
        {bits: np.concatenate([example.hidden[bits] for example in examples]) for bits in widths}
    )


def micro_batches(examples: Sequence[Example], token_budget: int) -> list[list[Example]]:
    """Examples of similar length together, padded tokens within the budget, the longest first.

    Examples without a trained token are left out. One that is longer than the budget goes alone.
    """
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        if example.num_trained == 0:
            continue
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].input_ids) <= token_budget:
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches
