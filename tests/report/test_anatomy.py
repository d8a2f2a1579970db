"""A teacher's sizes by its configuration against transformers' own models of it, without weights.

What it protects: the memory, the number of GPUs and the FLOPs that a plan states.
"""

from typing import Any

import pytest
import torch
import transformers

from distill.config import CacheConfig
from distill.report.anatomy import BYTES, anatomy
from distill.report.resources import Machine, fewest_gpus, held_dtype, largest_batch, memory_of, weight_bytes
from tests.teacher.families import FAMILIES, SMALL

QWEN_72B: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def counted(config: Any) -> int:
    """Parameters of transformers' model, made without memory."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family]})
    found = anatomy(config)
    assert found is not None
    assert found.total == pytest.approx(counted(config), rel=0.01)
    assert found.kv_values == 2 * 2 * 1 * 32


def test_a_mixture_of_experts_reads_only_those_that_a_token_takes() -> None:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2)
    found = anatomy(config)
    assert found is not None
    assert found.total == pytest.approx(counted(config), rel=0.01)
    experts = SMALL["num_hidden_layers"] * 3 * SMALL["hidden_size"] * SMALL["intermediate_size"]
    assert found.layers - found.active == 6 * experts


def test_the_flops_of_a_large_teacher() -> None:
    found = anatomy(transformers.Qwen2Config(**QWEN_72B))
    assert found is not None
    assert found.total == pytest.approx(72.7e9, rel=0.005)
    assert found.body_flops(0) == pytest.approx(2 * (found.total - found.embedding - found.head), rel=1e-6)
    assert found.head_flops(151_665) / found.body_flops(256) == pytest.approx(0.0175, rel=0.05)  # 2%, as measured
    assert found.body_flops(1000) - found.body_flops(0) == 4 * 80 * 64 * 128 * 1000


def test_gpus_and_batches_that_hold_a_large_teacher() -> None:
    model = transformers.Qwen2Config(**QWEN_72B)
    found = anatomy(model)
    assert found is not None
    config = CacheConfig(teacher="t", data={"d": ("-",)}, out="-", dtype="bfloat16")
    memory = memory_of(
        found, config=config, engine="vllm", vocab_size=151_665, dtype="bfloat16", machine=Machine(gpu_memory=80e9)
    )
    fewest = {weights.dtype: weights.tensor_parallel_size for weights in memory.weights}
    assert fewest == {"float32": 8, "bfloat16": 4, "float16": 4, "fp8": 2, "int4": 1}
    assert memory.kv_bytes == (8192 + 2048) * 2 * 80 * 8 * 128 * 2
    assert memory.head_bytes <= 2**30
    assert largest_batch(found, memory, config=config, gpu_memory=80e9) == 16384
    tight = memory_of(
        found, config=config, engine="vllm", vocab_size=151_665, dtype="bfloat16", machine=Machine(gpu_memory=43.2e9)
    )
    assert largest_batch(found, tight, config=config, gpu_memory=43.2e9) == 8192
    assert fewest_gpus(found, shared=1e12, room=1e9) is None
    assert weight_bytes(found, "float32") == BYTES["float32"] * found.total


def test_quantised_teachers_are_held_in_fewer_bits() -> None:
    model = transformers.Qwen2Config(**SMALL)
    assert held_dtype(model, "bfloat16") == "bfloat16"
    model.quantization_config = {"quant_method": "awq", "bits": 4}
    assert held_dtype(model, "bfloat16") == "int4"
    model.quantization_config = {"quant_method": "fp8"}
    assert held_dtype(model, "bfloat16") == "fp8"


def test_another_build_is_not_guessed_at() -> None:
    assert anatomy(transformers.GPT2Config()) is None
