"""The fitted projection on real forward passes: what it promises about the rebuilt distribution.

What it protects: mean, basis, bias, scale and soft cap fit together, and the proof comes from other rows than the fit.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from distill.cache.projection import Projection
from distill.cache.tail import Kind, rebuild, total_variation
from distill.config import CacheConfig, TargetsConfig
from distill.errors import DataError
from distill.records import Prompt
from distill.teacher import calibration
from distill.teacher.transformers_engine import TransformersEngine
from tests.teacher.families import random_prompt, save_tiny

TEMPERATURES = (4.0, 2.0, 1.0)


def prompts(num: int) -> list[Prompt]:
    return [random_prompt(40, first_trained=10, seed=n) for n in range(num)]


def load(family: str, folder: Path) -> TransformersEngine:
    config = CacheConfig(
        teacher=str(save_tiny(family, folder / family)),
        data={"random": ("-",)},
        out="-",
        dtype="float32",
        targets=TargetsConfig(top_k=8, temperatures=TEMPERATURES),
    )
    return TransformersEngine(config, vocab_size=500)


def distances(kind: Kind, proof: dict[str, NDArray[np.generic]], projection: Projection) -> list[float]:
    """Mean total variation to the teacher at each temperature."""
    hidden = {bits: proof[f"hidden_{bits}"] for bits, _ in projection.widths}
    logits_NV = projection.tail_logits(projection.dequantise(hidden))
    found = []
    for j, temperature in enumerate(TEMPERATURES):
        true_NV = np.exp(proof["logprobs"].astype(np.float64) / temperature)
        true_NV /= true_NV.sum(1, keepdims=True)
        rebuilt_NV = rebuild(
            kind,
            temperature=temperature,
            topk_ids_NK=proof["topk_ids"],
            topk_logprobs_NK=proof["topk_logprobs"],
            log_z_N=proof["log_z"][:, j],
            log_tail_N=proof["log_tail"][:, j],
            tail_logits_NV=logits_NV,
        )
        found.append(float(total_variation(rebuilt_NV, true_NV).mean()))
    return found


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2", "Granite"])
def test_the_rebuilt_distribution_nears_the_teachers(family: str, tmp_path: Path) -> None:
    engine = load(family, tmp_path)
    sample = calibration.split_sample(prompts(80))
    errors = {}
    for hidden_bytes in (4, 16, 64):
        projection = calibration.fit(engine, sample.fit, hidden_bytes=hidden_bytes)
        engine.install(projection)
        proof = calibration.fidelity(engine, sample.fidelity, seed=0)
        errors[hidden_bytes] = distances("low_rank", proof, projection)
    bucket = distances("bucket", proof, projection)
    assert proof["logprobs"].shape == (8 * len(sample.fidelity), 500)
    for j in range(len(TEMPERATURES)):
        assert errors[64][j] < errors[16][j] < errors[4][j] < bucket[j]
        assert errors[64][j] < 0.02  # 64 dimensions at 8 bits: all of the hidden state, so only quantisation is left


def test_proof_and_fit_share_no_sequence() -> None:
    every = prompts(80)
    sample = calibration.split_sample(every)
    assert len(sample.fidelity) + len(sample.fit) == 80
    assert not {p.sequence_id for p in sample.fidelity} & {p.sequence_id for p in sample.fit}


def test_positions_before_the_first_trained_one_do_not_count(tmp_path: Path) -> None:
    engine = load("Qwen2", tmp_path)
    assert engine.moments(prompts(3)).count == 3 * 30


def test_too_little_data_is_explained() -> None:
    with pytest.raises(DataError, match="--hidden-bytes 0"):
        calibration.split_sample(prompts(1))
