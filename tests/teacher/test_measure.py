"""What is measured of a teacher, against a forward pass of the same weights.

What it protects: masses and distances that decide what a user pays for, and that a narrower projection is the one that
the same calibration would have fitted.
"""

import numpy as np
import pytest

from distill.cache.projection import fit_projection
from distill.config import CacheConfig, TargetsConfig
from distill.errors import DataError
from distill.teacher import calibration
from distill.teacher.measure import HIDDEN_BYTES, TOP_KS, Measured, divide, measure, narrowed
from distill.teacher.transformers_engine import TransformersEngine
from tests.teacher.families import random_prompt, save_tiny

TARGETS = TargetsConfig(top_k=8, temperatures=(2.0, 1.0), hidden_bytes=32)
PROMPTS = [random_prompt(30, first_trained=10, seed=n) for n in range(60)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder = save_tiny("Qwen2", tmp_path_factory.mktemp("teacher"))
    config = CacheConfig(teacher=str(folder), data={"d": ("-",)}, out="-", dtype="float32", targets=TARGETS)
    return TransformersEngine(config, vocab_size=500)


@pytest.fixture(scope="module")
def found(engine: TransformersEngine) -> Measured:
    return measure(engine, divide(PROMPTS, num_tokens=200), targets=TARGETS, seed=0)


def test_sequences_are_divided_between_fit_and_measurement() -> None:
    drawn = divide(PROMPTS, num_tokens=100)  # 20 trained targets each
    assert [len(drawn.measured), len(drawn.fit)] == [5, 55]
    assert not {p.sequence_id for p in drawn.measured} & {p.sequence_id for p in drawn.fit}
    assert len(divide(PROMPTS[:4], num_tokens=1000).fit) == 2
    with pytest.raises(DataError, match="at least two"):
        divide(PROMPTS[:1], num_tokens=10)


def test_masses_are_those_of_a_forward_pass(engine: TransformersEngine, found: Measured) -> None:
    measured = divide(PROMPTS, num_tokens=200).measured
    hidden = dict(engine.hidden_states(measured))
    hidden_ND = np.concatenate([hidden[i][prompt.loss_mask] for i, prompt in enumerate(measured)])
    logprobs_NV = engine.head_logprobs(hidden_ND).astype(np.float64)
    assert found.num_trained == len(hidden_ND) == 200
    assert {(mass.temperature, mass.top_k) for mass in found.masses} == {
        (T, k) for T in (2.0, 1.0) for k in (8, *TOP_KS)
    }
    for mass in found.masses:
        probs_NV = np.exp(logprobs_NV / mass.temperature)
        probs_NV /= probs_NV.sum(1, keepdims=True)
        assert mass.mass == pytest.approx(np.sort(probs_NV)[:, -mass.top_k :].sum(1).mean(), abs=1e-6)


def test_distances_fall_with_every_byte_that_is_spent(found: Measured) -> None:
    distance = {(d.kind, d.temperature, d.top_k, d.hidden_bytes): d.total_variation for d in found.distances}
    assert found.num_compared == 96
    for temperature in (2.0, 1.0):
        for top_k in (8, *TOP_KS):
            low_rank = [distance["low_rank", temperature, top_k, size] for size in (32, 64)]
            kinds = [distance[kind, temperature, top_k, 0] for kind in ("bucket", "renormalised")]
            assert 0 < low_rank[1] < low_rank[0] < min(kinds) < 1
        bucket = [distance["bucket", temperature, top_k, 0] for top_k in (8, *TOP_KS)]
        assert bucket == sorted(bucket, reverse=True)


def test_bytes_and_rates_are_of_the_targets_asked_for(found: Measured) -> None:
    assert {"topk_ids", "topk_logprobs", "log_z", "log_tail", "entropy"} < set(found.bytes_per_token)
    hidden = sum(size for name, size in found.bytes_per_token.items() if name.startswith("hidden_"))
    assert 0.7 * 32 < hidden < 1.2 * 32
    assert 8 < found.bytes_per_token["topk_ids"] < 8 * 4
    assert found.num_fit_tokens == 50 * 20
    assert 0 < found.capture_tokens_per_s < float("inf")
    assert 0 < found.prefill_tokens_per_s < float("inf")


def test_a_narrower_projection_is_the_one_that_would_have_been_fitted(engine: TransformersEngine) -> None:
    moments, gram_DD = engine.moments(PROMPTS), engine.head_gram()
    wide = calibration.fit(engine, PROMPTS, hidden_bytes=max(HIDDEN_BYTES))
    fitted = fit_projection(moments, gram_DD=gram_DD, hidden_bytes=32)
    narrow = narrowed(wide, 32)
    assert narrow.widths == fitted.widths
    assert narrow.explained == pytest.approx(fitted.explained, rel=1e-3)
    np.testing.assert_allclose(narrow.down_RD, fitted.down_RD, rtol=1e-3, atol=1e-4)
