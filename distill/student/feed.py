"""A cache and a temperature flow in, batches for a trainer of one's own flow out, in an order that can be resumed.

``B`` sequences, ``S`` padded length, ``N`` trained tokens of the batch, ``K`` top-k, ``R`` rank of the cache's
projection. ``distill.batches`` is the way in; ``distill.student.kd`` has the losses that take these batches.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from distill.cache.join import open_caches
from distill.cache.projection import Projection
from distill.cache.reader import CacheReader
from distill.config import ShareConfig, TailShape
from distill.errors import DataError, IdentityError, UsageError
from distill.records import Split
from distill.student.batch import DistillBatch, Example, collate, example_of
from distill.student.losses.kl import TeacherTargets
from distill.student.losses.tail import TailModel
from distill.student.mixture import assign_domains
from distill.student.order import DomainOrder, UnitRows
from distill.student.stream import TrainStream

_SHARD_WINDOW = 4  # units whose rows are shuffled together; the default of `distill train`


class SharedTail:
    """The map from cached coordinates back to the teacher's logits, put on each device and dtype once."""

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self._made: dict[tuple[torch.device, torch.dtype], TailModel] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> TailModel:
        """The map on ``device``; ``dtype`` is that of its matrix product."""
        key = (device, dtype)
        if key not in self._made:
            self._made[key] = TailModel.of(self._projection, device=device, dtype=dtype)
        return self._made[key]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Padded sequences, and what the teacher left for their N trained tokens at one temperature.

    Target n belongs to the hidden state at flat index ``trained[n]`` of [B S] and describes the token after it,
    ``labels[n]``: nothing is to be shifted. ``position`` is how many sequences of the walk are used up with this batch
    (with all ranks' batches of this turn); ``Batches.walk(start=position)`` goes on there.
    """

    tensors: DistillBatch
    temperature: float
    column: int  # of the temperature in the cache
    tail: SharedTail | None
    vocab_size: int  # ids that exist; a head may have more rows
    position: int

    @property
    def input_ids(self) -> Tensor:
        """[B, S] int64, padded on the right with 0."""
        return self.tensors.input_ids

    @property
    def attention_mask(self) -> Tensor:
        """[B, S] int64, 1 where there is a token."""
        return self.tensors.attention_mask

    @property
    def trained(self) -> Tensor:
        """[N] int64, indices into the flattened [B S]."""
        return self.tensors.trained

    @property
    def labels(self) -> Tensor:
        """[N] int64, the token after each trained position."""
        return self.tensors.labels

    @property
    def teacher(self) -> TeacherTargets:
        """topk_ids [N, K], topk_log_p [N, K], log_tail [N], temperature; computed anew each time."""
        return self.tensors.teacher(self.temperature, self.column)

    @property
    def coords(self) -> Tensor | None:
        """[N, R] float32, of the teacher's final hidden states; None with a bucket tail. Computed anew each time."""
        return self.tensors.coords

    @property
    def num_trained(self) -> int:
        """N."""
        return self.tensors.num_trained

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``."""
        return replace(self, tensors=self.tensors.to(torch.device(device)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What ``distill.batches`` was asked for."""

    temperature: float
    split: Split
    domains: tuple[str, ...]
    max_length: int
    batch_tokens: int
    seed: int
    tail: TailShape


class Batches(IterableDataset[Batch]):
    """The batches of one split of a cache; ``for batch in batches`` is one epoch. Made by ``distill.batches``.

    A torch ``IterableDataset`` whose items are whole batches: give it to a DataLoader with ``batch_size=None`` and no
    workers of its own (a thread reads ahead already), or just iterate.
    """

    def __init__(self, reader: CacheReader, settings: Settings) -> None:
        self.reader, self.settings = reader, settings
        self._index = reader.temperature_index(settings.temperature)
        self.temperature = reader.temperatures[self._index]
        self.num_sequences = sum(reader.num_rows(domain, settings.split) for domain in settings.domains)  # of an epoch
        self._projection = reader.projection if settings.tail == "low_rank" else None
        self._tail = None if self._projection is None else SharedTail(self._projection)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch, counted from 0, iterating walks next; trainers of transformers and torch call this."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """One epoch. Raises UsageError inside a DataLoader worker, where every worker would yield all of it."""
        if get_worker_info() is not None:
            raise UsageError(
                "distill.batches was given to a DataLoader with workers, each of which would yield every batch. Leave "
                "num_workers at 0: a thread reads ahead already."
            )
        return self.walk(start=self._epoch * self.num_sequences, epochs=self._epoch + 1)

    def walk(self, *, start: int = 0, epochs: int = 1, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Batches from sequence ``start`` of the walk, counted over all epochs, to the end of epoch number ``epochs``.

        The walk is a pure function of cache, split, domains, ``max_length``, ``batch_tokens`` and seed, the same on
        every machine: a run that goes on from ``batch.position`` sees what it would have seen. Of every ``world_size``
        batches rank r takes the r-th; a last, incomplete turn is dropped, so that no rank waits for another.

        Raises what ``CacheReader.sequences`` does.
        """
        position, turn = start, list[list[Example]]()
        for group, used in self._groups(start, epochs * self.num_sequences):
            turn.append(group)
            position += used
            if len(turn) == world_size:
                yield self._batch(turn[rank], position)
                turn = []

    def _groups(self, start: int, stop: int) -> Iterator[tuple[list[Example], int]]:
        """Runs of the walk that fit the token budget when padded, and how many sequences each one uses up.

        Sequences without a trained token are used up but not trained on.
        """
        group: list[Example] = []
        used = 0
        for example in self._examples(start, stop):
            longest = max(len(held.input_ids) for held in [*group, example])
            if group and longest * (len(group) + 1) > self.settings.batch_tokens:
                yield group, used
                group, used = [], 0
            used += 1
            if example.num_trained:
                group.append(example)
        if group:
            yield group, used

    def _examples(self, start: int, stop: int) -> Iterator[Example]:
        if self.settings.split == "eval":
            yield from itertools.islice(self._held_out(), start, stop)
            return
        domains, max_length = self.settings.domains, self.settings.max_length
        orders = [
            DomainOrder(
                [UnitRows(unit=commit.unit, num_rows=commit.num_rows.train) for commit in self.reader.units(domain)],
                domain=domain,
                seed=self.settings.seed,
                shard_window=_SHARD_WINDOW,
            )
            for domain in domains
        ]
        shares = {domain: ShareConfig(start=order.num_rows) for domain, order in zip(domains, orders, strict=True)}
        with TrainStream(self.reader, orders, assign_domains(shares, stop), max_length=max_length) as stream:
            for step in stream.steps(start, 1):
                yield from step

    def _held_out(self) -> Iterator[Example]:
        """The held-out rows in the order of the cache, over and over."""
        while True:
            for domain in self.settings.domains:
                for commit in self.reader.units(domain):
                    for sequence in self.reader.sequences(commit, "eval"):
                        yield example_of(sequence, self.settings.max_length)

    def _batch(self, group: list[Example], position: int) -> Batch:
        return Batch(
            tensors=collate(group, self._projection),
            temperature=self.temperature,
            column=self._index,
            tail=self._tail,
            vocab_size=self.reader.identity.vocab_size,
            position=position,
        )


def batches(
    cache: str | Path | Sequence[str | Path] | CacheReader,
    *,
    temperature: float,
    split: Split = "train",
    domains: Sequence[str] | None = None,
    max_length: int = 512,
    batch_tokens: int = 4096,
    seed: int = 42,
    tail: TailShape = "low_rank",
) -> Batches:
    """Ready batches from a cache at one temperature, for a trainer of your own.

    ``cache`` is a folder or s3:// URL, several of one identity, or an open reader. ``domains`` are mixed by their
    numbers of rows (default: all). Sequences are cut to ``max_length`` tokens and put together while their padded
    tokens stay within ``batch_tokens``; train rows are shuffled by ``seed``, eval rows come in the order of the cache.
    ``tail`` says how the teacher's mass outside the top-k is spread: ``low_rank``, by the cached hidden states, or
    ``bucket``, as one category.

    Raises IdentityError for a temperature or a tail that the cache does not hold, DataError for a domain or rows that
    it does not have, UsageError for lengths that leave nothing, and what opening a cache raises.
    """
    if not isinstance(cache, CacheReader):
        cache = open_caches([cache] if isinstance(cache, str | Path) else cache)
    reader = cache
    if max_length < 2 or batch_tokens < 2:
        raise UsageError(
            f"max_length is {max_length} and batch_tokens {batch_tokens}, but a sequence with a target has two tokens "
            "at least. Use 2 or more for both."
        )
    if tail not in get_args(TailShape):
        raise UsageError(
            f"tail is '{tail}', which batches for a trainer of your own do not come with. Use tail='low_rank' or "
            "tail='bucket'."
        )
    if tail == "low_rank" and not reader.hidden_bytes:
        raise IdentityError(
            f"tail is low_rank, but {reader.where} {reader.why_no_hidden}: nothing tells the tail's shape. Use "
            "tail='bucket', or make a cache with --hidden-bytes 128."
        )
    wanted = reader.domains if domains is None else tuple(domains)
    for domain in wanted or ("any domain",):
        if not reader.num_rows(domain, split):
            raise DataError(
                f"{reader.where} has no {split} rows of {domain}; its domains are {', '.join(reader.domains)}. Name "
                "domains that have rows of this split, or make a cache with them."
            )
    settings = Settings(
        temperature=temperature,
        split=split,
        domains=wanted,
        max_length=max_length,
        batch_tokens=batch_tokens,
        seed=seed,
        tail=tail,
    )
    return Batches(reader, settings)
