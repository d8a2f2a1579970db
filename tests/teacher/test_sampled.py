"""Draws follow the teacher's distribution, tail included, however the vocabulary is sliced and the batch is cut."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from distill.cache.codec import counted, sampled_starts
from distill.teacher import sampled
from distill.teacher.capture import Head, LocalStatistics, Spec, local_statistics, merge, statistics
from distill.teacher.chunks import Chunks
from distill.teacher.engine import seed_of

VOCAB, NUM = 1003, 200
SPEC = Spec(top_k=16, temperatures=(2.0, 1.0), num_samples=NUM)


def case(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One distribution, asked for at ``rows`` positions of a sequence."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(VOCAB, 24, generator=generator) * 0.5
    hidden_ND = torch.randn(1, 24, generator=generator).expand(rows, -1).contiguous()
    return weight_VD, hidden_ND, torch.from_numpy(sampled.keys(seed_of("a"), 0, rows))


def in_chunks(rows: int) -> Chunks:
    """So many positions at a time."""
    chunks = Chunks(VOCAB, torch.device("cpu"))
    chunks.rows = rows
    return chunks


def chi_square(drawn: torch.Tensor, probs_V: torch.Tensor) -> float:
    """Pearson's statistic over classes of about 500 expected draws each, in standard deviations of its law."""
    order_V = probs_V.argsort(descending=True)
    expected_V = probs_V[order_V] * drawn.numel()
    found_V = torch.bincount(drawn.flatten(), minlength=VOCAB)[order_V].double()
    classes_V = (expected_V.cumsum(0) / 500).floor().long()
    expected = torch.zeros(int(classes_V[-1]) + 1, dtype=torch.float64).index_add(0, classes_V, expected_V)
    found = torch.zeros_like(expected).index_add(0, classes_V, found_V)
    expected, found = expected[expected > 50], found[expected > 50]
    return float((((found - expected) ** 2 / expected).sum() - len(expected)) / (2 * len(expected)) ** 0.5)


@pytest.mark.parametrize("bounds", [(0, VOCAB), (0, 400, VOCAB), (0, 10, 640, VOCAB)])
def test_draws_follow_the_distribution_over_any_slices(bounds: tuple[int, ...]) -> None:
    weight_VD, hidden_ND, keys_N = case(4000)
    parts = []
    for rank, (start, stop) in enumerate(pairwise(bounds)):
        head = Head(weight_VD[start:stop], first_id=start, num_ids=stop - start)
        packed = local_statistics(head, hidden_ND, SPEC, keys_N=keys_N, rank=rank).packed()
        parts.append(LocalStatistics.unpacked(packed, SPEC))
    drawn = merge(parts, SPEC, keys_N=keys_N).drawn
    assert drawn.shape == (4000, NUM)
    probs_V = (weight_VD.double() @ hidden_ND[0].double()).softmax(0)
    assert abs(chi_square(drawn, probs_V)) < 4.5
    other = torch.full_like(probs_V, 1 / VOCAB).lerp(probs_V, 0.97)  # the test would notice 3% drawn at random
    assert abs(chi_square(drawn, other)) > 20


def test_a_tail_of_tiny_probabilities_is_drawn_too() -> None:
    logits_V = torch.full((150_000,), -16.5)  # together as likely as a hundredth of the first id, each below 1e-7
    logits_V[7] = 0.0
    keys_N = torch.from_numpy(sampled.keys(1, 0, 500))
    drawn = sampled.draw(logits_V.expand(500, -1), sampled.uniforms(keys_N, 100, lane=0))
    share = float(((150_000 - 1) * np.exp(-16.5)) / (1 + (150_000 - 1) * np.exp(-16.5)))
    found = float((drawn != 7).double().mean())
    assert abs(found - share) < 5 * (share / drawn.numel()) ** 0.5
    assert drawn[drawn != 7].double().mean() == pytest.approx(75_000, rel=0.1)


def test_draws_depend_on_sequence_and_position_alone() -> None:
    weight_VD, hidden_ND, keys_N = case(40)
    head = Head(weight_VD, num_ids=VOCAB)
    whole = statistics(head, hidden_ND, SPEC, chunks=in_chunks(64), keys_N=keys_N).drawn
    cut = statistics(head, hidden_ND[5:30], SPEC, chunks=in_chunks(7), keys_N=keys_N[5:30]).drawn
    assert torch.equal(whole[5:30], cut)
    assert not torch.equal(whole[5], whole[6])
    other = torch.from_numpy(sampled.keys(seed_of("b"), 0, 40))
    assert not torch.equal(whole, statistics(head, hidden_ND, SPEC, chunks=in_chunks(64), keys_N=other).drawn)


def test_uniforms_are_uniform_and_lanes_independent() -> None:
    keys_N = torch.from_numpy(sampled.keys(seed_of("a"), 0, 2000))
    lanes = [sampled.uniforms(keys_N, 50, lane=lane).flatten().numpy() for lane in range(3)]
    for values in lanes:
        assert values.min() >= 0
        assert values.max() < 1
        counts = np.histogram(values, 100, (0, 1))[0]
        assert abs(((counts - 1000) ** 2 / 1000).sum() - 99) < 5 * (2 * 99) ** 0.5
    assert np.abs(np.corrcoef(lanes) - np.eye(3)).max() < 5 / len(lanes[0]) ** 0.5
    pairs = sampled.uniforms(keys_N, 50, lane=0).numpy()
    assert abs(np.corrcoef(pairs[:-1].ravel(), pairs[1:].ravel())[0, 1]) < 5 / pairs.size**0.5


def test_counts_say_what_was_drawn() -> None:
    drawn = np.array([[5, 3, 5, 5], [9, 9, 9, 9], [1, 2, 3, 4]], np.int32)
    ids, counts = counted(drawn)
    assert ids.tolist() == [5, 3, 9, 1, 2, 3, 4]
    assert counts.tolist() == [3, 1, 4, 1, 1, 1, 1]
    assert sampled_starts(counts, 4).tolist() == [0, 2, 3]
