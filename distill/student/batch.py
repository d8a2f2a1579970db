"""Cached sequences flow in, padded batches of tensors flow out, with targets for the trained tokens only.

    SequenceTargets -> Example (cut, trained positions only) -> DistillBatch -> student and losses

Target t belongs to the hidden state at position t and describes the token at t + 1: the cache made the shift, and
nothing here shifts again. ``B`` sequences, ``S`` padded length, ``N`` trained tokens of the batch, ``K`` top-k,
``T`` temperatures of the cache, ``R`` rank of its projection, ``L`` inner layers that it holds, of ``B`` bytes each.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.cache.projection import Projection
from distill.records import SequenceTargets, Targets
from distill.student.attention import KeptHeads, SequenceHeads
from distill.student.losses.kl import TeacherTargets
from distill.student.losses.sampled import SampledTargets
from distill.student.ranks import Ranks

NO_GROUP = "(none)"  # of rows that lack the metadata key


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Ids drawn from the teacher at T=1 at n positions, one position after the other."""

    ids: NDArray[np.int32]  # [J], different ones at each position
    counts: NDArray[np.int16]  # [J]
    entropy: NDArray[np.float32]  # [n], the teacher's


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
    levels: NDArray[np.int8]  # [n, R], hidden states as the cache has them; R = 0 where it has none
    sampled: Draws | None = None  # where the cache keeps ids drawn from the teacher
    inner: dict[int, NDArray[np.int8]] = field(default_factory=dict)  # kept inner layer -> [n, B], as in the cache
    heads: dict[int, KeptHeads] = field(default_factory=dict)  # layer -> queries and keys that the cache keeps
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
        levels=_levels(targets, positions),
        sampled=_draws(targets, positions),
        inner=_inner(targets, positions),
        heads=_heads(targets, positions, len(prompt.input_ids[:max_length]) - 1),
        group=None if group_by is None else group_of(prompt.metadata, group_by),
    )


def _levels(targets: Targets, positions: NDArray[np.int64]) -> NDArray[np.int8]:
    """Coordinates of all widths beside each other, as in ``Projection.dequantise``."""
    parts = [targets.hidden[bits][positions] for bits in sorted(targets.hidden, reverse=True)]
    return np.concatenate(parts, axis=1) if parts else np.zeros((len(positions), 0), np.int8)


def _inner(targets: Targets, positions: NDArray[np.int64]) -> dict[int, NDArray[np.int8]]:
    names = [name for name in targets.layers if name.endswith("_hidden")]
    kept = {int(name.removeprefix("layer").removesuffix("_hidden")): targets.layers[name] for name in names}
    return {layer: kept[layer][positions] for layer in sorted(kept)}


def _heads(targets: Targets, positions: NDArray[np.int64], num: int) -> dict[int, KeptHeads]:
    """Queries of trained positions, and keys of all ``num`` positions, which those may look back to."""
    names = [name for name in targets.layers if name.endswith("_q")]
    return {
        int(name.removeprefix("layer").removesuffix("_q")): KeptHeads(
            q=targets.layers[name][positions],
            q_scale=targets.layers[f"{name}_scale"][positions],
            k=targets.layers[f"{name[:-1]}k"][:num].copy(),
            k_scale=targets.layers[f"{name[:-1]}k_scale"][:num].copy(),
        )
        for name in names
    }


def _draws(targets: Targets, positions: NDArray[np.int64]) -> Draws | None:
    """Those of some positions. A position's ids end where the counts so far are a multiple of the number of draws."""
    ids, counts = targets.sampled_ids, targets.sampled_counts
    if ids is None or counts is None:
        return None
    sums = np.cumsum(counts, dtype=np.int64)
    num_samples = sums[-1] // len(targets.entropy)
    kept = np.isin((sums - 1) // num_samples, positions)
    return Draws(ids=ids[kept], counts=counts[kept], entropy=targets.entropy[positions])


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillBatch:
    """Padded sequences and, flattened over them, the targets of their trained tokens."""

    input_ids: Tensor  # [rows, S] int64, padded on the right; a row is a sequence, or several where they are packed
    attention_mask: Tensor  # [rows, S] int64, 1 where there is a token
    position_ids: Tensor | None  # [rows, S] int64, from 0 in each sequence of a packed row; None where rows are not
    trained: Tensor  # [N] int64, indices into the flattened [rows S]
    labels: Tensor  # [N] int64, the token after each trained position
    topk_ids: Tensor  # [N, K] int32: half of what would have to reach the device
    topk_logprobs: Tensor  # [N, K] float32
    log_z: Tensor  # [N, T] float32
    log_tail: Tensor  # [N, T] float32
    levels: Tensor | None  # [N, R] int8: a quarter of what the coordinates are that they stand for
    level_size: Tensor | None  # [R] float32
    inner: Tensor | None  # [N, L, B] int8, inputs of the L inner layers that the cache holds, in their order
    sampled: SampledTargets | None  # where every example has drawn ids
    heads: tuple[SequenceHeads, ...]  # of each sequence; they stay where they are until the attention loss needs them
    sequence: Tensor  # [N] int64, the sequence of each trained token
    keys: Tensor  # [B] int64, equal for sequences with the same tokens and trained positions
    domains: Tensor  # [B] int64, equal for sequences of the same domain

    @property
    def num_trained(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def coords(self) -> Tensor | None:
        """Coordinates of the teacher's final hidden states, [N, R] float32; as ``Projection.dequantise``.

        Computed anew each time: take them once, and ask ``levels`` whether there are any.
        """
        if self.levels is None or self.level_size is None:
            return None
        return (self.levels.float() + 0.5) * self.level_size

    @property
    def at_start(self) -> Tensor:
        """Which trained tokens stand at position 0 of their sequence: [N] bool."""
        if self.position_ids is None:
            return self.trained % self.input_ids.shape[1] == 0
        return self.position_ids.flatten()[self.trained] == 0

    def to(self, device: torch.device) -> "DistillBatch":
        """The batch on ``device``."""
        moved: dict[str, Any] = {}
        for column in fields(self):
            values = getattr(self, column.name)
            stays = values is None or isinstance(values, tuple)
            moved[column.name] = values if stays else values.to(device, non_blocking=True)
        return replace(self, **moved)

    def teacher(self, temperature: float, index: int) -> TeacherTargets:
        """The teacher's targets at a temperature, whose column in ``log_z`` and ``log_tail`` is ``index``."""
        return TeacherTargets(
            topk_ids=self.topk_ids.long(),
            topk_log_p=self.topk_logprobs / temperature - self.log_z[:, index, None],
            log_tail=self.log_tail[:, index],
            temperature=temperature,
        )


def collate(
    examples: Sequence[Example], projection: Projection | None, *, row_length: int | None = None
) -> DistillBatch:
    """One padded batch, with hidden states where there is a projection.

    With a ``row_length`` sequences are packed into rows of at most that many tokens. Position ids then start anew in
    each, and in the padding behind them, by which transformers keeps them from attending to each other.
    """
    places, num_rows, num_padded = _places(examples, row_length)
    input_ids_BS = np.zeros((num_rows, num_padded), np.int64)
    attention_mask_BS = np.zeros((num_rows, num_padded), np.int64)
    starts_BS = np.zeros((num_rows, num_padded), np.int64)
    for example, (row, start) in zip(examples, places, strict=True):
        stop = start + len(example.input_ids)
        input_ids_BS[row, start:stop] = example.input_ids
        attention_mask_BS[row, start:stop] = 1
        starts_BS[row, start:stop], starts_BS[row, stop:] = start, stop
    position_ids_BS = np.arange(num_padded) - starts_BS
    pairs = zip(examples, places, strict=True)
    trained = [example.positions + row * num_padded + start for example, (row, start) in pairs]
    labels = [example.input_ids[example.positions + 1] for example in examples]
    return DistillBatch(
        input_ids=torch.from_numpy(input_ids_BS),
        attention_mask=torch.from_numpy(attention_mask_BS),
        position_ids=None if row_length is None else torch.from_numpy(position_ids_BS),
        trained=torch.from_numpy(np.concatenate(trained)),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        topk_ids=torch.from_numpy(np.concatenate([example.topk_ids for example in examples])),
        topk_logprobs=torch.from_numpy(np.concatenate([example.topk_logprobs for example in examples])),
        log_z=torch.from_numpy(np.concatenate([example.log_z for example in examples])),
        log_tail=torch.from_numpy(np.concatenate([example.log_tail for example in examples])),
        levels=None
        if projection is None
        else torch.from_numpy(np.concatenate([example.levels for example in examples])),
        level_size=None if projection is None else torch.from_numpy(projection.level_size),
        inner=None if projection is None or not projection.layers else torch.from_numpy(_stacked(examples)),
        sampled=_sampled(examples),
        heads=tuple(
            SequenceHeads(row=row, start=start, positions=torch.from_numpy(example.positions), layers=example.heads)
            for example, (row, start) in zip(examples, places, strict=True)
        ),
        sequence=torch.from_numpy(np.repeat(np.arange(len(examples)), [example.num_trained for example in examples])),
        keys=torch.tensor([_key(example.input_ids.tobytes(), example.positions.tobytes()) for example in examples]),
        domains=torch.tensor([_key(example.domain.encode()) for example in examples]),
    )


def _key(*parts: bytes) -> int:
    digest = hashlib.blake2b(b"".join(parts), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _stacked(examples: Sequence[Example]) -> NDArray[np.int8]:
    """Kept states of the inner layers, [N, L, B]."""
    return np.concatenate([np.stack(list(example.inner.values()), axis=1) for example in examples])


def _sampled(examples: Sequence[Example]) -> SampledTargets | None:
    drawn = [example.sampled for example in examples if example.sampled is not None]
    if len(drawn) < len(examples):
        return None
    return SampledTargets.of(
        torch.from_numpy(np.concatenate([draws.ids for draws in drawn])),
        torch.from_numpy(np.concatenate([draws.counts for draws in drawn])),
        torch.from_numpy(np.concatenate([draws.entropy for draws in drawn])),
    )


def _places(examples: Sequence[Example], row_length: int | None) -> tuple[list[tuple[int, int]], int, int]:
    """The row and first column of each example, and the number of rows and columns; packed by first fit."""
    longest = max(len(example.input_ids) for example in examples)
    if row_length is None:
        return [(row, 0) for row in range(len(examples))], len(examples), longest
    filled: list[int] = []
    places = []
    for example in examples:
        length = len(example.input_ids)
        row = next((row for row, used in enumerate(filled) if used + length <= row_length), len(filled))
        if row == len(filled):
            filled.append(0)
        places.append((row, filled[row]))
        filled[row] += length
    return places, len(filled), max(filled)


def micro_batches(
    examples: Sequence[Example], token_budget: int, *, row_length: int | None = None, by_domain: bool = False
) -> list[list[Example]]:
    """Examples of similar length together, padded tokens within the budget, the longest first.

    Examples without a trained token are left out. One that is longer than the budget goes alone. With ``by_domain``
    none mixes domains; with a ``row_length`` they are to be packed as ``collate`` does, and more fit in.
    """
    batches: list[list[Example]] = []
    former: str | None = None
    for example in sorted(examples, key=lambda item: (item.domain if by_domain else "", -len(item.input_ids))):
        if example.num_trained == 0:
            continue
        together = [*batches[-1], example] if batches else []
        _, num_rows, num_columns = _places(together or [example], row_length)
        if together and num_rows * num_columns <= token_budget and not (by_domain and example.domain != former):
            batches[-1] = together
        else:
            batches.append([example])
        former = example.domain
    return batches


def rank_batches(
    examples: Sequence[Example],
    token_budget: int,
    ranks: Ranks,
    *,
    in_step: bool,
    row_length: int | None = None,
    by_domain: bool = False,
) -> list[tuple[list[Example], bool]]:
    """The micro-batches of this rank, each with whether it counts; those of all ranks together are the examples.

    Examples are dealt out in turn, the longest first, so every rank can tell what the others take. Ranks that must keep
    ``in_step``, since they hold parts of the same weights, take equally many: some then do one that counts nothing.
    """
    trained = sorted((example for example in examples if example.num_trained), key=lambda item: -len(item.input_ids))
    dealt = [
        micro_batches(trained[rank :: ranks.world], token_budget, row_length=row_length, by_domain=by_domain)
        for rank in (range(ranks.world) if in_step else [ranks.rank])
    ]
    own = dealt[ranks.rank] if in_step else dealt[0]
    idle = max(len(batches) for batches in dealt) - len(own)
    return [(batch, True) for batch in own] + [(trained[-1:], False)] * idle
