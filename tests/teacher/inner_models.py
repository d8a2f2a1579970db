"""Inner layers and heads of tiny models, as an engine captures them, against transformers' own states, queries, keys
and attention maps. Used by tests, and run as a program where vLLM needs a process of its own:

    python -m tests.teacher.inner_models MODEL… MODEL@2        # one JSON object: MODEL -> largest errors

``@2`` runs the model on two tensor-parallel ranks. With VLLM_USE_V2_MODEL_RUNNER=1 and TRITON_INTERPRET=1 in the
environment vLLM's second model runner is at work, the one that GPUs get.
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from distill.cache.attention import dequantise, rebuild_map
from distill.cache.projection import Projection
from distill.config import CacheConfig, TargetsConfig
from distill.records import Targets
from distill.teacher import calibration
from distill.teacher.engine import Engine
from distill.teacher.heads import attention_specs, kept_heads
from tests.teacher.capture_models import use_second_model_runner
from tests.teacher.families import random_prompt, save_tiny

VOCAB, BYTES = 500, 16
GROUPED = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# Name -> family and what differs: biases as large as the products, norms, shared keys, scaled rotary embeddings, caps.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2", {**GROUPED, "bias": 2.0}),
    "Qwen3": ("Qwen3", {**GROUPED}),
    "Llama3": ("Llama", {**GROUPED, "rope_parameters": LLAMA3}),
    "Yarn": ("Llama", {**GROUPED, "rope_parameters": YARN}),
    "Gemma2": ("Gemma2", {**GROUPED, "attn_logit_softcapping": 10.0, "sliding_window": 16}),
    "OneKey": ("Qwen2", {"num_hidden_layers": 3, "bias": 2.0}),
}
TARGETS = TargetsConfig(top_k=8, layers=(2, 0), layer_bytes=BYTES, heads={2: (1, 0), 1: (1,)})
# Longer than a step of 32 tokens, so that vLLM sees them in pieces.
PROMPTS = [random_prompt(length, seed=length) for length in (1, 30, 33, 100)]
FIT = [random_prompt(60, first_trained=5, seed=100 + n) for n in range(30)]


def make(name: str, folder: Path) -> Path:
    """Writes a model of ``MODELS``."""
    family, more = MODELS[name]
    return save_tiny(family, folder / name, **more)


def config_for(folder: Path, **options: Any) -> CacheConfig:
    """In float32, with ``options`` for the engine."""
    return CacheConfig(
        teacher=str(folder),
        data={"random": ("-",)},
        out="-",
        dtype="float32",
        max_length=128,
        targets=TARGETS,
        engine_options=options,
    )


def fitted(engine: Engine, folder: Path) -> Projection:
    """The projection that a job would fit, written and read once."""
    model = AutoConfig.from_pretrained(folder)
    layers = calibration.fit_layers(engine, FIT, layers=TARGETS.layers, layer_bytes=BYTES)
    specs = attention_specs(folder, model, kept_heads(model, TARGETS))
    plain = calibration.fit(engine, FIT, hidden_bytes=8)
    return Projection.from_bytes(replace(plain, layers=layers, attention=specs).to_bytes())


class Truth:
    """What the model itself makes of a sequence, computed eagerly in float32."""

    def __init__(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self._decoder = model.get_decoder()
        self._seen: dict[str, NDArray[np.float32]] = {}
        for layer in TARGETS.heads:
            attention = self._decoder.layers[layer].self_attn
            for side in ("q", "k"):
                projection = getattr(attention, f"{side}_proj")
                module = getattr(attention, f"{side}_norm", projection)
                bias = projection.bias if module is projection else None
                module.register_forward_hook(self._keep(f"layer{layer}_{side}", bias))

    def _keep(self, name: str, bias: torch.Tensor | None) -> Any:
        def keep(_module: torch.nn.Module, _arguments: Any, output: torch.Tensor) -> None:
            values = output[0] if bias is None else output[0] - bias
            self._seen[name] = values.flatten(1).numpy()

        return keep

    def __call__(self, input_ids: NDArray[np.int32]) -> tuple[dict[str, NDArray[np.float32]], list[Any], list[Any]]:
        """All queries and keys by column, inputs of layers [L-1, D], maps [all heads, L-1, L-1]."""
        ids = torch.from_numpy(input_ids[:-1].astype(np.int64))[None]
        with torch.inference_mode():
            output = self._decoder(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
        states = [states[0].numpy() for states in output.hidden_states]
        return self._seen, states, [maps[0].double().numpy() for maps in output.attentions]


def errors(targets: Targets, projection: Projection, truth: tuple[Any, list[Any], list[Any]]) -> dict[str, float]:
    """Largest errors; of states, queries and keys in quantiser levels."""
    columns, states, maps = truth
    found: dict[str, float] = {}
    for layer, inner in projection.layers.items():
        captured = targets.layers[f"layer{layer}_hidden"]
        exact = states[layer] @ inner.down.T
        inside = np.abs(captured.astype(int)) < 127
        off = np.abs(inner.dequantise(captured) - exact) / inner.step
        found["state"] = max(found.get("state", 0.0), float(off[inside].max(initial=0.0)))
        expected = inner.quantise(states[layer]).astype(int)
        found["clipped"] = max(found.get("clipped", 0.0), float(np.abs(captured - expected).max()))
    for layer, spec in projection.attention.items():
        kept = {}
        for side, heads in (("q", spec.heads), ("k", spec.kv_heads)):
            scale = targets.layers[f"layer{layer}_{side}_scale"]
            kept[side] = dequantise(targets.layers[f"layer{layer}_{side}"], scale)
            exact = columns[f"layer{layer}_{side}"].reshape(len(scale), -1, spec.head_dim)[:, list(heads)]
            off = np.abs(kept[side] - exact) / scale[:, :, None]
            found["q and k"] = max(found.get("q and k", 0.0), float(off.max()))
        own = maps[layer][list(spec.heads)]
        apart = np.abs(rebuild_map(kept["q"], kept["k"], spec) - own).sum(2) / 2
        found["map"] = max(found.get("map", 0.0), float(apart.mean()))
        # Without the rounding of queries and keys nothing is left of the difference.
        q, k = (columns[f"layer{layer}_{side}"].reshape(len(states[0]), -1, spec.head_dim) for side in ("q", "k"))
        unrounded = rebuild_map(q[:, list(spec.heads)], k[:, list(spec.kv_heads)], spec)
        found["exact map"] = max(found.get("exact map", 0.0), float(np.abs(unrounded - own).max()))
    return found


def measured(engine: Engine, folder: Path) -> dict[str, float]:
    """Largest errors of an engine on all prompts. Closes the engine."""
    projection = fitted(engine, folder)
    engine.install(projection)
    captured = dict(engine.capture(PROMPTS))
    engine.close()
    truth, worst = Truth(folder), dict[str, float]()
    for ordinal, prompt in enumerate(PROMPTS):
        for name, value in errors(captured[ordinal], projection, truth(prompt.input_ids)).items():
            worst[name] = max(worst.get(name, 0.0), value)
    return worst


def main() -> None:
    """Measures every model that the command line names in vLLM."""
    from distill.teacher.vllm_engine import VllmEngine

    second = bool(os.environ.get("VLLM_USE_V2_MODEL_RUNNER"))
    if second:
        use_second_model_runner()
    report = {}
    for argument in sys.argv[1:]:
        name, _, ranks = argument.partition("@")
        options: dict[str, Any] = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "kv_cache_memory_bytes": 16 << 20}
        if ranks:
            options["tensor_parallel_size"] = int(ranks)
        with tempfile.TemporaryDirectory() as scratch:
            folder = make(name, Path(scratch))
            report[argument] = measured(VllmEngine(config_for(folder, **options), vocab_size=VOCAB), folder)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
