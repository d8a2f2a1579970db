"""Teachers and engines that cannot serve, each refused by its own words.

What it protects: the class, hence the exit code, and the way out, before anything is written.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, FalconH1Config, FalconH1ForCausalLM, GPT2Config, GPT2LMHeadModel

from distill.config import CacheConfig, ColumnsConfig
from distill.errors import DataError, DistillError, IdentityError, RetryError, UsageError
from distill.teacher import vllm_names
from distill.teacher.calibration import fit_layers
from distill.teacher.engine import engine_name
from distill.teacher.job import cache_teacher, prepare
from distill.teacher.transformers_engine import TransformersEngine
from distill.teacher.vllm_engine import VllmEngine
from tests.teacher.families import SMALL, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("Qwen3", tmp_path_factory.mktemp("teacher") / "tiny")


def config_of(teacher: Path, data: Path, **more: Any) -> CacheConfig:
    data.write_text("".join(json.dumps({"text": f"t{i} t{i + 1} t{i + 2}"}) + "\n" for i in range(8)))
    values = {"teacher": str(teacher), "data": {"general": (str(data),)}, "out": str(data.parent / "cache")}
    return CacheConfig.model_validate({**values, "engine": "transformers", "max_length": 64, **more})


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def with_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def with_a_small_head(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 400}))


def with_a_broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "t2"}')


def with_garbled_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights at all")


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (without_config, "has no config.json, so it is not a model folder. Give the folder that holds it"),
        (with_broken_config, r"transformers cannot read the teacher's .*config\.json"),
        (with_a_small_head, "has ids up to 499, its LM head only 400 rows: they do not belong together"),
        (with_a_broken_generation_config, r"cannot read .*generation_config\.json: invalid literal.*Download"),
        (with_garbled_weights, "transformers cannot load the teacher"),
    ],
)
def test_a_teacher_that_is_not_whole(tiny: Path, tmp_path: Path, break_it: Callable[[Path], None], says: str) -> None:
    folder = shutil.copytree(tiny, tmp_path / "teacher")
    break_it(folder)
    with pytest.raises(UsageError, match=says):
        cache_teacher(config_of(folder, tmp_path / "data.jsonl"), quiet=True)


def test_options_that_the_engine_does_not_know(tiny: Path, tmp_path: Path) -> None:
    config = config_of(tiny, tmp_path / "data.jsonl", engine_options={"no_such_option": 1})
    with pytest.raises(UsageError, match=r"transformers cannot load the teacher .*no_such_option"):
        TransformersEngine(config, vocab_size=500)


def saved(model: Any, folder: Path, tiny: Path) -> Path:
    """The model with the tiny teacher's tokenizer."""
    model.save_pretrained(folder)
    for path in tiny.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def test_a_teacher_whose_logits_are_scaled_in_an_unknown_way(tiny: Path, tmp_path: Path) -> None:
    sizes = {**SMALL, "num_attention_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32}
    model = FalconH1ForCausalLM(FalconH1Config(**sizes, lm_head_multiplier=0.5))
    config = config_of(saved(model, tmp_path / "teacher", tiny), tmp_path / "data.jsonl", dtype="float32")
    with pytest.raises(UsageError, match="FalconH1ForCausalLM does something to its logits that distill does not know"):
        TransformersEngine(config, vocab_size=500)


def test_a_teacher_that_calls_its_layers_otherwise(tiny: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=2, n_positions=256))
    folder = saved(model, tmp_path / "teacher", tiny)
    config = config_of(folder, tmp_path / "data.jsonl", dtype="float32", targets={"top_k": 8, "hidden_bytes": 16})
    assert cache_teacher(config, quiet=True).manifest is not None
    inner = config.targets.model_copy(update={"layers": (1,), "layer_bytes": 16})
    with pytest.raises(UsageError, match="GPT2Model does not show its layers"):
        TransformersEngine(config.model_copy(update={"targets": inner}), vocab_size=500)


def test_further_chat_templates_are_kept(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    writer = prepare(config_of(folder, tmp_path / "data.jsonl")).writer
    assert isinstance(writer.root, Path)
    kept = AutoTokenizer.from_pretrained(writer.root / "teacher")
    assert kept.chat_template == tokenizer.chat_template


def test_what_an_engine_quantises_is_another_teacher(tiny: Path, tmp_path: Path) -> None:
    prepare(config_of(tiny, tmp_path / "data.jsonl"))
    quantised = config_of(tiny, tmp_path / "data.jsonl", engine_options={"quantization": "fp8"})
    with pytest.raises(IdentityError, match="quantisation: cache none, asked fp8"):
        prepare(quantised)


def test_other_columns_are_other_data(tiny: Path, tmp_path: Path) -> None:
    config = config_of(tiny, tmp_path / "data.jsonl")
    rows = [{"text": f"t{i} t{i + 1}", "body": f"t{i + 7} t{i + 9}"} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(config)
    with pytest.raises(IdentityError, match=r"columns of .*: cache as found, asked text=body"):
        prepare(config.model_copy(update={"columns": ColumnsConfig(text="body")}))


def test_no_sequence_to_calibrate_inner_layers_on(tiny: Path, tmp_path: Path) -> None:
    engine = TransformersEngine(config_of(tiny, tmp_path / "data.jsonl"), vocab_size=500)
    with pytest.raises(DataError, match="Inner layers are calibrated on sequences of three tokens or more"):
        fit_layers(engine, [], layers=[1], layer_bytes=8)


def test_vllm_that_is_not_installed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = config_of(tiny, tmp_path / "data.jsonl")
    assert engine_name(config.model_copy(update={"engine": None})) == "transformers"
    with pytest.raises(UsageError, match="--engine vllm was asked for, but vllm is not installed"):
        engine_name(config.model_copy(update={"engine": "vllm"}))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"worker_cls": "mine"}, UsageError, "engine_options.worker_cls is set by distill itself; remove it"),
        ({"no_such_option": 1}, UsageError, "vllm .* refuses .* or engine_options: "),
        ({"max_model_len": 32}, UsageError, r"max_model_len is 32, and sequences may have 64 tokens\. Choose"),
        ({"kv_cache_memory_bytes": 1}, RetryError, "vllm .* could not start with .* Nothing written so far is lost"),
    ],
)
def test_options_that_vllm_cannot_start_with(
    tiny: Path, tmp_path: Path, options: dict[str, object], error: type[DistillError], says: str
) -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    config = config_of(tiny, tmp_path / "data.jsonl", engine="vllm", dtype="float32", engine_options=options)
    with pytest.raises(error, match=says):
        VllmEngine(config, vocab_size=500)


def test_releases_of_vllm_that_do_not_fit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = pytest.importorskip("vllm", exc_type=ImportError)
    monkeypatch.setitem(vllm_names.INNER_NAMES, "v1/worker/gpu_worker.py", {"Worker": ("no_such_method",)})
    with pytest.raises(UsageError, match=r"has moved what inner layers rely on: .*no_such_method"):
        vllm_names.check_installed("0.0", inner=True)
    monkeypatch.setattr(vllm, "__version__", "0.9.0")
    with pytest.raises(UsageError, match=r"vllm 0\.9\.0 is too old; install vllm"):
        VllmEngine(config_of(tiny, tmp_path / "data.jsonl", engine="vllm"), vocab_size=500)
