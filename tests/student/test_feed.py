"""Batches for other people's trainers: every row once, resumable anywhere, one rank's part each, refusals.

What it protects: the order contract of ``distill.batches`` and what a ``Batch`` holds.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import distill
from distill.cache.reader import CacheReader

TRAIN, HELD_OUT = 80, 16  # sequences of both domains


def sequences(walk: Iterable[distill.Batch]) -> list[tuple[int, ...]]:
    return [
        tuple(row[mask.bool()].tolist())
        for batch in walk
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def rows_of(reader: CacheReader, split: Any) -> list[tuple[int, ...]]:
    return [
        tuple(row.prompt.input_ids.tolist()) for commit in reader.commits for row in reader.sequences(commit, split)
    ]


def test_an_epoch_has_every_train_row_once_in_a_shuffled_order(world: Any) -> None:
    made = distill.batches(world.cache, temperature=2, batch_tokens=100)
    got, expected = sequences(made), rows_of(made.reader, "train")
    assert made.num_sequences == len(got) == TRAIN
    assert sorted(got) == sorted(expected)
    assert got != expected
    assert sequences(made) == got
    made.set_epoch(1)
    second = sequences(made)
    assert sorted(second) == sorted(expected)
    assert second != got
    other = distill.batches(world.cache, temperature=2, batch_tokens=100, seed=7)
    assert sequences(other) != got


def test_held_out_rows_come_in_the_order_of_the_cache(world: Any) -> None:
    made = distill.batches(CacheReader.open(world.cache), temperature=1, split="eval", batch_tokens=100)
    assert sequences(made) == rows_of(made.reader, "eval")
    assert made.num_sequences == HELD_OUT


def test_a_walk_goes_on_from_any_batch(world: Any) -> None:
    made = distill.batches(world.cache, temperature=4, batch_tokens=100)
    whole = list(made.walk(epochs=2))
    assert whole[-1].position == 2 * TRAIN
    for batch in (whole[0], whole[12], whole[-2]):
        rest = made.walk(start=batch.position, epochs=2)
        assert sequences(rest) == sequences(whole[whole.index(batch) + 1 :])


def test_ranks_share_the_batches_and_stay_in_step(world: Any) -> None:
    made = distill.batches(world.cache, temperature=4, batch_tokens=100)
    alone = list(made.walk())
    ranks = [list(made.walk(rank=rank, world_size=3)) for rank in range(3)]
    assert [len(walk) for walk in ranks] == [len(alone) // 3] * 3
    for number, batch in enumerate(alone[: 3 * (len(alone) // 3)]):
        assert torch.equal(ranks[number % 3][number // 3].input_ids, batch.input_ids)
    positions = [[batch.position for batch in walk] for walk in ranks]
    assert positions[0] == positions[1] == positions[2]
    assert positions[0][0] == alone[2].position


def test_a_batch_holds_what_it_says(world: Any) -> None:
    made = distill.batches(world.cache, temperature=2, batch_tokens=100, domains=["medical"])
    assert made.num_sequences == TRAIN // 2
    for batch in made:
        (num_sequences, num_padded), num = batch.input_ids.shape, batch.num_trained
        assert num_sequences * num_padded <= 100
        assert batch.teacher.topk_ids.shape == batch.teacher.topk_log_p.shape == (num, made.reader.top_k)
        assert batch.coords is not None
        assert len(batch.coords) == num
        assert torch.equal(batch.labels, batch.input_ids.flatten()[batch.trained + 1])
        mass = batch.teacher.topk_log_p.exp().sum(1) + batch.teacher.log_tail.exp()
        assert torch.allclose(mass, torch.ones(num), atol=0.01)
        assert batch.teacher.temperature == 2.0
        assert batch.vocab_size == made.reader.identity.vocab_size
        assert batch.to("meta").teacher.log_tail.device.type == "meta"


def test_short_cuts_leave_out_what_trains_nothing(world: Any) -> None:
    short = distill.batches(world.cache, temperature=2, max_length=9, batch_tokens=20)
    assert {tuple(batch.input_ids.shape) for batch in short} == {(2, 9)}
    assert list(distill.batches(world.cache, temperature=2, max_length=8, batch_tokens=20)) == []  # prompts alone


def test_what_cannot_be_served_is_refused_at_once(world: Any, bare_cache: Path) -> None:
    with pytest.raises(distill.IdentityError, match="holds targets for the temperatures 4, 2, 1, not 3"):
        distill.batches(world.cache, temperature=3)
    with pytest.raises(distill.IdentityError, match="tail='bucket'"):
        distill.batches(bare_cache, temperature=2)
    assert next(iter(distill.batches(bare_cache, temperature=2, tail="bucket"))).coords is None
    with pytest.raises(distill.DataError, match="no train rows of law"):
        distill.batches(world.cache, temperature=2, domains=["law"])
    with pytest.raises(distill.UsageError, match="batch_tokens 1"):
        distill.batches(world.cache, temperature=2, batch_tokens=1)
    with pytest.raises(distill.UsageError, match="tail is 'sampled'"):
        distill.batches(world.cache, temperature=1, tail="sampled")  # type: ignore[arg-type]
    with pytest.raises(distill.UsageError, match="hold the same data"):
        distill.batches([world.cache, world.cache], temperature=2)
    with pytest.raises(distill.DataError, match="no cache at"):
        distill.batches(world.student, temperature=2)


def test_a_data_loader_hands_batches_on_and_its_workers_are_refused(world: Any) -> None:
    made = distill.batches(world.cache, temperature=2, batch_tokens=100)
    assert sequences(DataLoader(made, batch_size=None)) == sequences(made)
    with pytest.raises(distill.UsageError, match="num_workers"):
        next(iter(DataLoader(made, batch_size=None, num_workers=1, multiprocessing_context="fork")))
