"""The reference that rebuilds a teacher's distribution: exact where it must be, and better with the low-rank tail."""

from typing import Any

import numpy as np
import pytest

from distill.cache.tail import Kind, rebuild, total_variation

TEMPERATURES = (4.0, 2.0, 1.0)


def at(teacher: Any, hidden: np.ndarray, kind: Kind, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(rebuilt, true) distributions at one temperature."""
    targets, projection = teacher.targets(hidden), teacher.projection
    rebuilt = rebuild(
        kind,
        temperature=TEMPERATURES[index],
        topk_ids_NK=targets.topk_ids,
        topk_logprobs_NK=targets.topk_logprobs,
        log_z_N=targets.log_z[:, index],
        log_tail_N=targets.log_tail[:, index],
        tail_logits_NV=projection.tail_logits(projection.dequantise(targets.hidden)),
    )
    scaled = np.exp(teacher.logprobs(hidden) / TEMPERATURES[index])
    return rebuilt, scaled / scaled.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def wide_teacher(make_teacher: Any) -> Any:
    return make_teacher(dim=64, vocab=2000, top_k=32, hidden_bytes=16)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_cached_ids_and_tail_mass_are_exact(wide_teacher: Any, index: int) -> None:
    hidden = wide_teacher.hidden(np.random.default_rng(5), 20)
    ids = wide_teacher.targets(hidden).topk_ids
    for kind in ("low_rank", "bucket"):
        rebuilt, true = at(wide_teacher, hidden, kind, index)
        np.testing.assert_allclose(rebuilt.sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(
            np.take_along_axis(rebuilt, ids, 1), np.take_along_axis(true, ids, 1), rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize("index", [0, 1, 2])
def test_low_rank_beats_uniform_beats_nothing_at_high_temperature(wide_teacher: Any, index: int) -> None:
    hidden = wide_teacher.hidden(np.random.default_rng(6), 60)
    distances = {
        kind: total_variation(*at(wide_teacher, hidden, kind, index)).mean()
        for kind in ("low_rank", "bucket", "renormalised")
    }
    assert distances["low_rank"] < 0.6 * distances["bucket"]
    assert distances["bucket"] < distances["renormalised"]


def test_full_rank_in_eight_bits_recovers_the_teacher(make_teacher: Any) -> None:
    teacher = make_teacher(dim=32, vocab=500, top_k=4, hidden_bytes=32)
    assert teacher.projection.widths == ((8, 32),)
    hidden = teacher.hidden(np.random.default_rng(7), 40)
    for index in range(3):
        assert total_variation(*at(teacher, hidden, "low_rank", index)).mean() < 0.02


def test_renormalised_puts_everything_on_the_cached_ids(teacher: Any) -> None:
    hidden = teacher.hidden(np.random.default_rng(8), 5)
    rebuilt, _ = at(teacher, hidden, "renormalised", 0)
    np.testing.assert_allclose(rebuilt.sum(1), 1)
    assert ((rebuilt > 0).sum(1) == teacher.top_k).all()


def test_total_variation_of_known_distributions() -> None:
    np.testing.assert_allclose(
        total_variation(np.array([[1.0, 0], [0.5, 0.5]]), np.array([[0.0, 1], [0.25, 0.75]])), [1.0, 0.25]
    )
