"""Inner layers, queries and keys in both engines, against transformers' own states and attention maps.

What it protects: the layer's number, the shift, the order of heads across tensor-parallel ranks, norms, biases and
rotary embeddings; and that Parquet gives back what was captured.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM

import distill
from distill.cache.attention import dequantise, rebuild_map
from distill.cache.reader import CacheReader
from distill.config import CacheConfig, TargetsConfig
from distill.errors import UsageError
from distill.records import Question
from distill.teacher.engine import Writing
from distill.teacher.job import prepare
from distill.teacher.transformers_engine import TransformersEngine
from tests.teacher.conftest import run_cli
from tests.teacher.families import SMALL, random_prompt
from tests.teacher.inner_models import MODELS, VOCAB, config_for, fitted, make, measured

Report = dict[str, dict[str, float]]
LAYERS, HEADS = (1, 2), {1: (3, 0), 2: (2,)}


def assert_exact(worst: dict[str, float]) -> None:
    """Half a level of rounding, where nothing is clipped, and maps that lose no more than that costs."""
    assert worst["state"] <= 0.51
    assert worst["clipped"] <= 1
    assert worst["q and k"] <= 0.51
    assert worst["exact map"] <= 1e-4
    assert worst["map"] <= 0.02


@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_what_the_model_computes(name: str, tmp_path: Path) -> None:
    folder = make(name, tmp_path)
    assert_exact(measured(TransformersEngine(config_for(folder, batch_tokens=64), vocab_size=VOCAB), folder))


def in_vllm(*models: str, **environment: str) -> Report:
    """What ``tests.teacher.inner_models`` prints, in a process of its own."""
    pytest.importorskip("vllm", exc_type=ImportError)
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.teacher.inner_models", *models]
    whole = {**os.environ, "PYTHONPATH": str(repository), **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=whole, cwd=repository)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Report = json.loads(done.stdout.splitlines()[-1])
    return found


def test_vllm_gives_what_the_model_computes() -> None:
    """A bias, norms, a scaled rotary embedding; Gemma 2, of which vLLM hands out no layers, by hooks."""
    report = in_vllm("Qwen2", "Qwen3", "Llama3", "Gemma2")
    assert len(report) == 4
    for worst in report.values():
        assert_exact(worst)


def test_the_second_model_runner_gives_the_same() -> None:
    assert_exact(in_vllm("Qwen2", VLLM_USE_V2_MODEL_RUNNER="1", TRITON_INTERPRET="1")["Qwen2"])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each tensor-parallel rank needs a core of its own")
def test_heads_come_from_the_ranks_that_have_them() -> None:
    """Two key heads on two ranks, and one key head that both ranks hold."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    report = in_vllm("Qwen2@2", "OneKey@2", VLLM_CPU_OMP_THREADS_BIND=f"{first}|{second}")
    for worst in report.values():
        assert_exact(worst)


def test_an_answer_of_the_teachers_own_has_them_too(tmp_path: Path) -> None:
    """Written token by token: the same numbers as of the whole sequence read at once."""
    folder = make("Qwen3", tmp_path)
    engine = TransformersEngine(config_for(folder), vocab_size=VOCAB)
    projection = fitted(engine, folder)
    engine.install(projection)
    prompt = random_prompt(20, seed=3)
    question = Question(
        prompt_id="q", domain="d", split="train", source="s", prompt="", input_ids=prompt.input_ids[:12]
    )
    writing = Writing(temperature=0, top_p=1, max_tokens=9, max_length=64, stop_ids=(2,), seed=0)
    [(_, answer, targets)] = engine.answer([question], writing)
    whole = random_prompt(len(answer) + 11)
    whole.input_ids[:] = [*question.input_ids, *answer]
    [(_, read)] = engine.capture([whole])
    assert targets.layers.keys() == read.layers.keys()
    for name, values in read.layers.items():
        assert np.abs(targets.layers[name].astype(float) - values.astype(float)).max() <= 1, name
        assert (np.abs(targets.layers[name].astype(float) - values) > 1e-3).mean() <= 0.01, name


def settings(teacher: Path, data: Path, out: Path, engine: str) -> dict[str, Any]:
    options: dict[str, Any] = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "kv_cache_memory_bytes": 64 << 20}
    return {
        "teacher": str(teacher),
        "data": {"texts": [str(data)]},
        "out": str(out),
        "engine": engine,
        "engine_options": options if engine == "vllm" else {"batch_tokens": 256},
        "dtype": "float32",
        "max_length": 256,
        "calibration_tokens": 400,
        "targets": {"top_k": 8, "layer_bytes": 32, "heads": {layer: list(heads) for layer, heads in HEADS.items()}},
    }


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_from_the_command_line_to_parquet_and_back(
    engine: str, tiny_teacher: Path, data_files: dict[str, Path], tmp_path: Path
) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm", exc_type=ImportError)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"cache": settings(tiny_teacher, data_files["texts"], tmp_path / "cache", engine)}))
    done = run_cli("cache-teacher", "--config", file, "--layers", "2,1", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    cache, frame = CacheReader.open(tmp_path / "cache"), distill.open(tmp_path / "cache")
    identity, projection = cache.identity, cache.projection
    assert (identity.layers, identity.layer_bytes) == (LAYERS, 32)
    assert [(kept.layer, kept.heads, kept.kv_heads, kept.head_dim) for kept in identity.heads] == [
        (1, (0, 3), (0, 1), 32),
        (2, (2,), (1,), 32),
    ]
    assert projection is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32, attn_implementation="eager").eval()
    for _, row in frame.iterrows():
        with torch.inference_mode():
            ids = torch.tensor(row["input_ids"][:-1], dtype=torch.long)[None]
            output = model.model(ids, output_hidden_states=True, output_attentions=True)
        for layer in LAYERS:
            coords = output.hidden_states[layer][0].numpy() @ projection.layers[layer].down.T
            off = np.abs(projection.layers[layer].dequantise(row[f"layer{layer}_hidden"]) - coords)
            inside = np.abs(row[f"layer{layer}_hidden"].astype(int)) < 127
            assert (off / projection.layers[layer].step)[inside].max(initial=0) <= 0.51
            spec = projection.attention[layer]
            q, k = (dequantise(row[f"layer{layer}_{x}"], row[f"layer{layer}_{x}_scale"]) for x in ("q", "k"))
            apart = rebuild_map(q, k, spec) - output.attentions[layer][0].numpy()[list(spec.heads)]
            assert np.abs(apart).sum(2).mean() / 2 <= 0.02


def test_what_the_teacher_does_not_have_is_refused_before_it_loads(
    tiny_teacher: Path, data_files: dict[str, Path], tmp_path: Path
) -> None:
    for targets, says in (
        ({"layers": [3]}, "layers 0 to 2"),
        ({"heads": {1: [4]}}, "heads 0 to 3"),
    ):
        values = {
            **settings(tiny_teacher, data_files["texts"], tmp_path / "cache", "transformers"),
            "targets": targets,
        }
        with pytest.raises(UsageError, match=says):
            prepare(CacheConfig.model_validate(values))
    assert not (tmp_path / "cache").exists()


def test_vllm_says_why_it_cannot_give_inner_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of which it hands out none, compiled, and pipeline stages; the final state needs neither."""
    pytest.importorskip("vllm", exc_type=ImportError)
    from distill.teacher import vllm_inner

    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))
    runner = SimpleNamespace(get_model=lambda: model)
    for targets, stages, eager, says in (
        (TargetsConfig(layers=(1,)), 1, False, "gives no inner layers of LlamaForCausalLM unless .*enforce_eager"),
        (TargetsConfig(heads={1: (0,)}), 2, True, "pipeline parallelism"),
        (TargetsConfig(layers=(1,)), 1, True, None),
        (TargetsConfig(), 2, False, None),
    ):
        monkeypatch.setattr(vllm_inner, "get_pp_group", lambda stages=stages: SimpleNamespace(world_size=stages))
        refusal = vllm_inner.InnerLayers(runner, targets=targets, eager=eager).refusal
        assert re.search(says, refusal or "") if says else refusal is None
