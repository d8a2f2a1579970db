"""What is known of a teacher's attention before its weights load.

What it protects: constants of a layer are those of its family, and a layer whose maps could not be rebuilt is refused
before a cache is filled with its queries and keys.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from distill.cache.attention import AttentionSpec
from distill.config import TargetsConfig
from distill.errors import UsageError
from distill.teacher.heads import attention_specs, check_layers, kept_heads
from distill.teacher.inner import LayerInputs
from tests.teacher.families import FAMILIES, SMALL, save_tiny

NOWHERE = Path("/nonexistent")


def model_config(family: str, **more: Any) -> Any:
    return getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES.get(family, {}), **more})


def spec_of(family: str, folder: Path = NOWHERE, **more: Any) -> AttentionSpec:
    model = model_config(family, **more)
    return attention_specs(folder, model, kept_heads(model, TargetsConfig(heads={1: (1,)})))[1]


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Mistral", "Phi3", "SmolLM3"])
def test_most_families_turn_halves(family: str) -> None:
    spec = spec_of(family)
    assert (spec.interleaved, len(spec.inv_freq), spec.rope_factor) == (False, 16, 1.0)
    assert spec.softmax_scale == pytest.approx(32**-0.5)
    assert (spec.q_bias, spec.k_bias, spec.soft_cap) == (None, None, None)


@pytest.mark.parametrize("family", ["Cohere", "Helium", "Ernie4_5"])
def test_some_families_turn_neighbours(family: str) -> None:
    assert spec_of(family).interleaved


def test_families_with_a_scale_a_cap_or_a_window_of_their_own() -> None:
    assert spec_of("Granite").softmax_scale == 0.2
    assert spec_of("Gemma2", attn_logit_softcapping=7.0).soft_cap == 7.0
    assert spec_of("Mistral", sliding_window=64).window == 64
    assert spec_of("Gemma2", sliding_window=64, layer_types=["full_attention", "sliding_attention"]).window == 64
    assert spec_of("Gemma2", sliding_window=64, layer_types=["sliding_attention", "full_attention"]).window is None


def test_a_layer_without_rotary_embedding_is_seen() -> None:
    assert len(spec_of("SmolLM3", no_rope_layers=[1, 0]).inv_freq) == 0


def test_yarn_has_a_factor() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    assert spec_of("Llama", rope_parameters=yarn).rope_factor == pytest.approx(1.1386, abs=1e-3)


def test_biases_come_from_the_checkpoint(tmp_path: Path) -> None:
    folder = save_tiny("Qwen2", tmp_path, num_attention_heads=4, num_key_value_heads=2, hidden_size=128, bias=2.0)
    model = transformers.AutoConfig.from_pretrained(folder)
    spec = attention_specs(folder, model, kept_heads(model, TargetsConfig(heads={1: (3, 1)})))[1]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).model.layers[1].self_attn
    assert (spec.heads, spec.kv_heads, spec.group) == ((1, 3), (0, 1), (0, 1))
    assert spec.q_bias is not None
    assert spec.k_bias is not None
    assert spec.q_bias.tolist() == loaded.q_proj.bias.unflatten(0, (4, 32))[[1, 3]].tolist()
    assert spec.k_bias.tolist() == loaded.k_proj.bias.unflatten(0, (2, 32)).tolist()


@pytest.mark.parametrize(
    ("family", "more", "says"),
    [
        ("Qwen3", {"attention_bias": True}, "after a bias"),
        ("Olmo2", {}, "does not norm its input"),
        ("DeepseekV3", {}, "does not norm its input"),
        ("Cohere", {"use_qk_norm": True}, "norms its heads together"),
        ("Qwen2", {}, "0 tensors that could be q_proj.bias"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "changes with the length",
        ),
        ("GptOss", {"attention_bias": False}, "come out wrong by"),
    ],
    ids=["bias and norm", "no norm before", "latent keys", "norm over heads", "bias lost", "dynamic", "sinks"],
)
def test_an_attention_of_another_kind_is_refused(family: str, more: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        spec_of(family, **more)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ({"layers": (2,)}, "layer 2 was asked for, but the teacher has layers 0 to 1"),
        ({"heads": {5: (0,)}}, "layer 5 was asked for"),
        ({"heads": {1: (2,)}}, "head 2 of layer 1, but the teacher has heads 0 to 1"),
        ({"layers": (1,), "layer_bytes": 65}, "64 dimensions"),
    ],
)
def test_what_does_not_exist_is_refused(targets: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_layers(model_config("Qwen3"), TargetsConfig(**targets))


def test_what_exists_is_not_refused() -> None:
    check_layers(model_config("Qwen3"), TargetsConfig(layers=(0, 1), layer_bytes=64, heads={1: (0, 1)}))


def test_quantised_projections_are_refused_by_transformers() -> None:
    """Their rows cannot be picked head by head."""
    model = transformers.AutoModelForCausalLM.from_config(model_config("Qwen3"))
    heads = kept_heads(model.config, TargetsConfig(heads={1: (1,)}))
    LayerInputs(model, layers=(), heads=heads)
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    model.model.layers[1].self_attn.q_proj.weight = weight
    with pytest.raises(UsageError, match=r"layer 1 .*quantised"):
        LayerInputs(model, layers=(), heads=heads)
