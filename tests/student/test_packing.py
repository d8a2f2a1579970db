"""Protects packing and dealing: packed sequences learn as if alone, and every example is some rank's, exactly once."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache.reader import CacheReader
from distill.config import StageConfig, TrainConfig
from distill.errors import UsageError
from distill.student.batch import collate, example_of, micro_batches, rank_batches
from distill.student.model import Origin, load_student
from distill.student.objective import Objective, TeacherView
from distill.student.precision import resolve_precision
from distill.student.ranks import Ranks

LENGTHS = (24, 9, 14, 11, 22, 10)


@pytest.fixture(scope="module")
def reader(world):
    return CacheReader.open(world.cache)


@pytest.fixture(scope="module")
def examples(reader):
    rows = reader.sequences(reader.commits[0], "train")
    return [example_of(row, length) for row, length in zip(rows, LENGTHS, strict=False)]


def student_of(world, **changes):
    config = TrainConfig(cache=str(world.cache), student=str(world.student), out="unused", tune="full", **changes)
    precision = resolve_precision("cpu", "fp32")
    return load_student(config, Origin(base=str(world.student)), precision=precision, vocab_size=300, training=True)


def losses_and_gradients(world, reader, examples, *, packing):
    student = student_of(world, packing=packing)
    stage = StageConfig.model_validate(
        {
            **TrainConfig(cache="c", student="s", out="o").stage(1).model_dump(),
            "temperature": 2.0,
            "weights": {"kl": 1, "ce": 1},
        }
    )
    objective = Objective(student, TeacherView.of(reader, student.precision), stage, adapter=None, head_chunk=16)
    batch = collate(examples, reader.projection, row_length=24 if packing else None)
    sums = objective(batch)
    sums.weighted.backward()
    return batch, sums, {name: value.grad for name, value in student.trainable()}


def test_packed_sequences_have_the_losses_and_gradients_of_padded_ones(world, reader, examples):
    padded, packed = (losses_and_gradients(world, reader, examples, packing=packing) for packing in (False, True))
    assert padded[0].input_ids.shape == (6, 24)
    assert packed[0].input_ids.shape == (4, 24)
    assert packed[0].labels.tolist() == padded[0].labels.tolist()
    for name, value in padded[1].named.items():
        torch.testing.assert_close(packed[1].named[name], value, rtol=1e-5, atol=0)
    for name, gradient in padded[2].items():
        torch.testing.assert_close(packed[2][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_positions_start_anew_in_each_packed_sequence(examples):
    batch = collate([examples[4], examples[1], examples[3]], None, row_length=24)
    assert batch.position_ids.tolist() == [list(range(22)), [*range(9), *range(11), *range(2)]]
    assert batch.attention_mask.sum(1).tolist() == [22, 20]
    assert batch.sequence.unique().tolist() == [0, 1, 2]


def test_a_student_that_would_mix_packed_sequences_is_refused(world, monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _positions: None)
    with pytest.raises(UsageError, match="Qwen3ForCausalLM lets packed sequences attend to each other"):
        student_of(world, packing=True)
    student_of(world, packing=False)


def test_a_student_that_keeps_them_apart_in_one_row_alone_is_refused(world, monkeypatch):
    """As kernels of variable length do, which take several rows for sequences that nothing was packed into."""
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: find(ids) if len(ids) == 1 else None)
    with pytest.raises(UsageError, match="lets packed sequences attend to each other"):
        student_of(world, packing=True)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(8, 24), min_size=1, max_size=12),
    world_size=st.integers(1, 4),
    budget=st.integers(8, 100),
    row_length=st.sampled_from([None, 24, 40]),
    by_domain=st.booleans(),
)
def test_ranks_take_every_example_once_within_the_budget(examples, lengths, world_size, budget, row_length, by_domain):
    cut = [
        dataclasses.replace(
            examples[0], input_ids=examples[0].input_ids[:length], positions=examples[0].positions[:1], domain=domain
        )
        for length, domain in zip(lengths, "abcabcabcabc", strict=False)
    ]
    shares = [
        rank_batches(
            cut, budget, Ranks(rank=rank, world=world_size), in_step=True, row_length=row_length, by_domain=by_domain
        )
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1  # ranks that hold parts of the same weights keep in step
    counted = [batch for share in shares for batch, counts in share if counts]
    assert sorted(id(e) for batch in counted for e in batch) == sorted(map(id, cut))
    for batch in counted:
        assert len(batch) == 1 or collate_rows(batch, row_length).numel() <= budget
        assert not by_domain or len({e.domain for e in batch}) == 1


def collate_rows(batch, row_length):
    """The rows of tokens that a micro-batch becomes."""
    whole = [dataclasses.replace(e, positions=e.positions[:0]) for e in batch]  # targets do not matter here
    return collate(whole, None, row_length=row_length).input_ids


def test_packing_needs_fewer_micro_batches(examples):
    assert len(micro_batches(examples, 48)) == 3
    assert len(micro_batches(examples, 48, row_length=24)) == 2


def lengths_of(batches):
    return [[len(example.input_ids) for example in batch] for batch in batches]


@pytest.mark.parametrize("by_domain", [False, True])
def test_sequences_of_like_length_share_a_micro_batch(examples, by_domain):
    """In the order they come the six would be two batches of 72 and 69 padded tokens instead of 72 and 33."""
    longest = examples[0]
    assert len(longest.input_ids) == 24
    mixed = [dataclasses.replace(longest, input_ids=longest.input_ids[:length]) for length in (24, 9, 22, 10, 23, 11)]
    assert lengths_of(micro_batches(mixed, 72, by_domain=by_domain)) == [[24, 23, 22], [11, 10, 9]]
    dealt = [rank_batches(mixed, 72, Ranks(rank=rank, world=2), in_step=False, by_domain=by_domain) for rank in (0, 1)]
    assert [lengths_of(batch for batch, _ in own) for own in dealt] == [[[24, 22, 10]], [[23, 11, 9]]]
