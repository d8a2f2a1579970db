"""Protects batches: target t stands against hidden state t and token t + 1, whatever padding, cut and micro-batch."""

import dataclasses

import numpy as np
import pytest
import torch

from distill.cache.reader import CacheReader
from distill.student.batch import collate, example_of, micro_batches


@pytest.fixture
def sequences(world):
    reader = CacheReader.open(world.cache)
    return reader.sequences(reader.commits[0], "train")


def with_length(sequence, length):
    """The sequence as if its row had been shorter."""
    prompt, targets = sequence.prompt, sequence.targets
    cut = {
        name: getattr(targets, name)[: length - 1]
        for name in ("topk_ids", "topk_logprobs", "log_z", "log_tail", "entropy")
    }
    return dataclasses.replace(
        sequence,
        prompt=dataclasses.replace(
            prompt, input_ids=prompt.input_ids[:length], loss_mask=prompt.loss_mask[: length - 1]
        ),
        targets=dataclasses.replace(
            targets, hidden={bits: values[: length - 1] for bits, values in targets.hidden.items()}, **cut
        ),
    )


def test_each_trained_token_has_its_own_targets(world, sequences):
    """Row by row and position by position against the plain arrays of the cache."""
    lengths = [24, 11, 17]
    rows = [with_length(sequence, length) for sequence, length in zip(sequences, lengths, strict=False)]
    projection = CacheReader.open(world.cache).projection
    batch = collate([example_of(row, 100) for row in rows], projection)
    assert batch.sequence.tolist() == (batch.trained // batch.input_ids.shape[1]).tolist()
    expected = [(b, t) for b, row in enumerate(rows) for t in np.flatnonzero(row.prompt.loss_mask)]
    assert batch.num_trained == len(expected) == sum(row.prompt.loss_mask.sum() for row in rows)
    for n, (b, t) in enumerate(expected):
        row = rows[b]
        assert batch.trained[n] == b * 24 + t
        assert batch.input_ids.flatten()[batch.trained[n]] == row.prompt.input_ids[t]
        assert batch.labels[n] == row.prompt.input_ids[t + 1]
        assert batch.topk_ids[n].tolist() == row.targets.topk_ids[t].tolist()
        assert batch.log_tail[n].tolist() == row.targets.log_tail[t].tolist()
        hidden = {bits: values[t : t + 1] for bits, values in row.targets.hidden.items()}
        np.testing.assert_array_equal(batch.coords[n].numpy(), projection.dequantise(hidden)[0])
    assert batch.attention_mask.sum(1).tolist() == lengths


def test_teacher_targets_are_those_of_the_temperature(sequences):
    batch = collate([example_of(sequences[0], 100)], None)
    targets = batch.teacher(2.0, 1)
    first = int(np.flatnonzero(sequences[0].prompt.loss_mask)[0])
    kept = sequences[0].targets
    np.testing.assert_allclose(
        targets.topk_log_p[0].numpy(), kept.topk_logprobs[first] / 2 - kept.log_z[first, 1], rtol=1e-6
    )
    assert targets.log_tail[0] == kept.log_tail[first, 1]


def test_a_cut_keeps_the_targets_before_it_and_may_leave_none(sequences):
    whole, cut, none = (example_of(sequences[0], length) for length in (24, 12, 6))
    assert cut.num_trained == 4  # positions 7 to 10; 11 would predict a token that is cut off
    np.testing.assert_array_equal(cut.topk_ids, whole.topk_ids[:4])
    assert none.num_trained == 0
    assert len(none.input_ids) == 6


def test_padding_does_not_change_a_student(world, sequences):
    """Hidden states of padded rows are those of each row alone."""
    from distill.config import TrainConfig
    from distill.student.model import Origin, load_student
    from distill.student.precision import resolve_precision

    config = TrainConfig(cache=str(world.cache), student=str(world.student), out="unused")
    precision = resolve_precision("cpu", "fp32")
    student = load_student(config, Origin(base=str(world.student)), precision=precision, vocab_size=300, training=False)
    examples = [example_of(with_length(s, n), 100) for s, n in zip(sequences, (24, 11, 17), strict=False)]
    with torch.no_grad():
        together = student.hidden(collate(examples, None))
        alone = torch.cat([student.hidden(collate([example], None)) for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_micro_batches_hold_every_trained_example_once_within_the_budget(sequences):
    examples = [example_of(with_length(s, 9 + 3 * n), 100) for n, s in enumerate(sequences[:5])]
    examples.append(example_of(sequences[5], 6))  # has no trained token
    batches = micro_batches(examples, 36)
    assert sorted(id(e) for group in batches for e in group) == sorted(id(e) for e in examples[:5])
    for group in batches:
        assert len(group) == 1 or len(group) * max(len(e.input_ids) for e in group) <= 36
    assert max(map(len, batches)) > 1
    assert [len(group) for group in micro_batches(examples, 2)] == [1] * 5


def test_keys_are_equal_for_the_same_tokens_and_trained_positions_alone(sequences):
    first, second = (example_of(sequence, 100) for sequence in sequences[:2])
    shorter = example_of(sequences[0], 20)
    untrained = dataclasses.replace(first, positions=first.positions[1:])
    keys = [collate([example], None).keys.item() for example in (first, first, second, shorter, untrained)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
