"""Protects the way out: an exported student is a plain folder whose logits are those of its checkpoint."""

import json
import subprocess
import sys
from itertools import count

import pytest
import torch
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from distill.__main__ import app
from distill.errors import CorruptionError, UsageError
from distill.student import export
from distill.student.evaluate import evaluate_model
from distill.student.export import export_student
from distill.student.origin import origin_of
from distill.student.trainer import train_stage
from tests.student.conftest import save_model

IDS = torch.arange(20)[None]


def adapters_own_logits(checkpoint):
    """Logits of base and adapter as peft computes them, unmerged."""
    from peft import PeftModel

    origin = origin_of(checkpoint)
    base = AutoModelForCausalLM.from_pretrained(origin.base, dtype=torch.float32)
    with torch.no_grad():
        alone = base(IDS).logits
        return PeftModel.from_pretrained(base, origin.adapter)(IDS).logits, alone


def test_an_adapter_is_merged_and_loads_in_transformers(configured, tmp_path):
    lora = {"r": 4, "target_modules": ["q_proj", "up_proj", "down_proj"]}
    best = train_stage(configured(tune="lora", lora=lora, student_layers=2), 1, quiet=True).best
    exported = export_student(best, tmp_path / "model")
    assert exported.merged_adapter
    assert exported.logit_error < 1e-5
    wanted, base_alone = adapters_own_logits(best)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - base_alone).abs().max() > 0.01  # the adapter had something to say
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("w3 w4").input_ids == [5, 6]
    assert not list((tmp_path / "model").glob("adapter*"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_tied_and_untied_heads(configured, tmp_path, tie, tune):
    """A head of its own is written, a tied one is not; either way the logits are the checkpoint's, layers left out."""
    save_model(tmp_path / "student", seed=1, num_hidden_layers=4, tie_word_embeddings=tie)
    settings = {"student": str(tmp_path / "student"), "student_layers": 2, "layer_choice": "loss", "tune": tune}
    best = train_stage(configured(**settings, stage={"max_steps": 2}), 1, quiet=True).best
    exported = export_student(best, tmp_path / "model")
    assert exported.logit_error < 1e-5
    assert ("lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")) == (not tie)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["num_hidden_layers"]) == (tie, 2)
    of_checkpoint, of_export = (evaluate_model(configured(), model).overall for model in (best, tmp_path / "model"))
    assert of_export.ce == pytest.approx(of_checkpoint.ce, rel=1e-5)
    assert of_export.kl[1.0] == pytest.approx(of_checkpoint.kl[1.0], rel=1e-4)


def test_full_fine_tuning_is_exported_in_another_dtype(configured, tmp_path):
    best = train_stage(configured(stage={"max_steps": 2}), 1, quiet=True).best
    exported = export_student(best, tmp_path / "model", dtype="bfloat16")
    assert (exported.merged_adapter, exported.dtype) == (False, "bfloat16")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    own = AutoModelForCausalLM.from_pretrained(best / "model", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        assert (own(IDS).logits - model(IDS).logits).norm() < 0.02 * own(IDS).logits.norm()


def with_other_weights(model):
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] += 1e-3


def with_another_configuration(model):
    model.model.layers[0].self_attn.scaling *= 3


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            with_other_weights,
            r"read back with other weights .* 1 tensors differ, model\.layers\.0\.mlp\.up_proj\.weight",
        ),
        (with_another_configuration, "not the student of .* its logits differ by"),
    ],
)
def test_another_model_is_noticed_and_nothing_is_kept(configured, tmp_path, monkeypatch, damage, says):
    best = train_stage(configured(tune="lora"), 1, quiet=True).best
    load = export.load_causal

    def damaged(base, **options):
        model = load(base, **options)
        if base.endswith(".new"):
            damage(model)
        return model

    monkeypatch.setattr(export, "load_causal", damaged)
    with pytest.raises(CorruptionError, match=says):
        export_student(best, tmp_path / "model")
    assert not list(tmp_path.glob("*model*"))
    assert not list(tmp_path.glob(".*"))


MERGE = Linear.merge


def unmerged(model, _adapter):
    return model.unload()


def merged_twice(layer, *arguments, **options):
    MERGE(layer, *arguments, **options)
    layer.merged_adapters.clear()
    MERGE(layer, *arguments, **options)


def merged_in_part(layer, *arguments, **options):
    layer.scaling["default"] *= 0.9
    MERGE(layer, *arguments, **options)


def merged_but_for(skipped):
    """All layers but the one with this number, which thinks that it is merged."""
    calls = count()

    def merge(layer, **_):
        if next(calls) == skipped:
            layer.merged_adapters.append("default")
        else:
            MERGE(layer)

    return merge


FAULTS = {
    "not at all": lambda: (export, "merged", unmerged),
    "twice": lambda: (Linear, "merge", merged_twice),
    "in part": lambda: (Linear, "merge", merged_in_part),
    "but for the first layer": lambda: (Linear, "merge", merged_but_for(0)),
    "but for the last layer": lambda: (Linear, "merge", merged_but_for(5)),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_wrong_merge_of_a_barely_trained_adapter_is_noticed(configured, tmp_path, monkeypatch, dtype):
    """What a few steps changed is less than what rounding does to logits, and must be in the weights all the same."""
    lora = {"r": 4, "dropout": 0.0, "target_modules": ["q_proj", "up_proj", "down_proj"]}
    brief = {"max_steps": 3, "learning_rate": 1e-5}
    best = train_stage(configured(tune="lora", lora=lora, student_layers=2, stage=brief), 1, quiet=True).best
    for fault in FAULTS.values():
        with monkeypatch.context() as patch:
            patch.setattr(*fault())
            with pytest.raises(
                CorruptionError, match=r"is not merged as it was trained: the weights of .*proj are off"
            ):
                export_student(best, tmp_path / "model", dtype=dtype)
        assert not list(tmp_path.glob("*model*"))
    assert export_student(best, tmp_path / "model", dtype=dtype).merged_adapter


def test_an_existing_folder_is_left_alone(tmp_path):
    with pytest.raises(UsageError, match="exists"):
        export_student(tmp_path, tmp_path)


def test_the_commands(configured, world, tmp_path):
    """eval and export as a user types them; eval reads the checkpoint, the export and the base alike."""
    best = train_stage(configured(tune="lora", stage={"max_steps": 4}), 1, quiet=True).best

    def distill(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "120"}, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "merged" in distill("export", best, "--out", tmp_path / "model")
    common = ("eval", "--cache", world.cache, "--set", "device=cpu")
    by = json.loads(distill(*common, "--student", best, "--json", "--group-by", "department"))
    merged = json.loads(distill(*common, "--student", tmp_path / "model", "--json"))
    assert by["overall"]["ce"] == pytest.approx(merged["overall"]["ce"], rel=1e-4)
    assert set(by["groups"]) == {"(none)", "cardiology", "neurology"}
    assert list(merged["overall"]["kl"]) == ["4.0", "2.0", "1.0"]
    text = distill(*common, "--student", world.student)
    assert "medical" in text
    assert "top-5" in text


VLLM_SCRIPT = """
import sys
from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=2**26)
tokens = llm.generate({"prompt_token_ids": [2, 3, 4]}, SamplingParams(max_tokens=8, temperature=0), use_tqdm=False)
print("tokens", *tokens[0].outputs[0].token_ids)
"""


def test_an_export_loads_in_vllm_and_says_the_same(configured, tmp_path):
    """With its head tied to its embedding, and layers left out."""
    pytest.importorskip("vllm", exc_type=ImportError)
    save_model(
        tmp_path / "student", seed=1, head_dim=32, num_hidden_layers=4
    )  # vLLM has no attention for smaller heads on CPUs
    settings = {"student": str(tmp_path / "student"), "student_layers": 2, "layer_choice": "loss"}
    best = train_stage(configured(tune="lora", **settings), 1, quiet=True).best
    folder = export_student(best, tmp_path / "model").folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[2, 3, 4]])
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    command = [sys.executable, "-c", VLLM_SCRIPT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = next(line for line in done.stdout.splitlines() if line.startswith("tokens"))
    assert said == " ".join(["tokens", *map(str, ids[0, 3:].tolist())])
