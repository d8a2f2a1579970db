"""Protects what a student is made of: kept layers, head, LoRA or all weights, precision, and what is refused."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch

from distill.config import LoraConfig, TrainConfig
from distill.errors import IdentityError, UsageError
from distill.student.export import export_student
from distill.student.model import Origin, causal_of, load_causal, load_student
from distill.student.precision import resolve_precision
from distill.student.shrink import evenly_spaced, keep_layers, shrunken_student
from distill.student.trainer import train_stage

VOCAB = 300


def load(world, *, base=None, precision="fp32", training=True, vocab_size=VOCAB, **changes):
    config = TrainConfig.model_validate({"cache": "unused", "student": str(world.student), "out": "unused", **changes})
    return load_student(
        config,
        Origin(base=str(base or world.student)),
        precision=resolve_precision("cpu", precision),
        vocab_size=vocab_size,
        training=training,
    )


def test_layers_are_evenly_spaced_with_first_and_last():
    assert evenly_spaced(4, 1) == [0]
    assert evenly_spaced(28, 2) == [0, 27]
    assert evenly_spaced(28, 4) == [0, 9, 18, 27]
    for total in range(1, 40):
        for num in range(2, total + 1):
            kept = evenly_spaced(total, num)
            assert (kept[0], kept[-1], len(set(kept))) == (0, total - 1, num)
            gaps = [after - before for before, after in itertools.pairwise(kept)]
            assert max(gaps) - min(gaps) <= 1


def test_a_shrunken_student_is_a_plain_model_of_the_kept_layers(world, tmp_path):
    folder = shrunken_student(str(world.student), 2, folder=tmp_path / "student", trust_remote_code=False)
    whole = load_causal(str(world.student), dtype=torch.float32, trust_remote_code=False)
    small = load_causal(str(folder), dtype=torch.float32, trust_remote_code=False)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert len(config["layer_types"]) == 2
    for kept, layer in zip((0, 3), small.model.layers, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, whole.model.layers[kept].mlp.up_proj.weight)
    assert (folder / "tokenizer.json").is_file()


def test_layers_kept_in_place_generate_with_a_cache(world):
    """Attention finds its keys and values by layer_idx, which must be the new number."""
    model = load_causal(str(world.student), dtype=torch.float32, trust_remote_code=False)
    assert keep_layers(model, 2) == [0, 3]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    ids = torch.randint(0, VOCAB, (1, 9))
    with_cache = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1)
    without = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1, use_cache=False)
    assert torch.equal(with_cache, without)


def test_a_shrunken_student_is_made_once_and_not_mixed_up(world, tmp_path):
    folder = tmp_path / "student"
    shrunken_student(str(world.student), 2, folder=folder, trust_remote_code=False)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    shrunken_student(str(world.student), 2, folder=folder, trust_remote_code=False)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="student_layers 2, and 3"):
        shrunken_student(str(world.student), 3, folder=folder, trust_remote_code=False)


def test_more_layers_than_there_are_is_refused(world):
    model = load_causal(str(world.student), dtype=torch.float32, trust_remote_code=False)
    with pytest.raises(UsageError, match="has 4 layers"):
        keep_layers(model, 5)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_loaded_student_is_in_the_mode_it_is_loaded_for(world, tune):
    """Dropout and gradient checkpointing depend on it, in a resumed run as well, which does not evaluate first."""
    for training in (True, False):
        modules = load(world, tune=tune, training=training).model.modules()
        assert {module.training for module in modules} == {training}


def test_full_training_trains_everything_in_float32(world):
    student = load(world, tune="full", precision="bf16")
    parameters = dict(student.trainable())
    assert len(parameters) == len(list(student.model.parameters()))
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert student.head().compute_dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_lora_trains_float32_adapters_on_a_frozen_base(world, precision):
    student = load(world, precision=precision, gradient_checkpointing=True)
    parameters = dict(student.trainable())
    assert len(parameters) == 4 * 7 * 2  # layers, modules, A and B
    assert all("lora_" in name for name in parameters)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert student.head().weight.dtype == compute
    assert not student.head().weight.requires_grad


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradient_checkpointing_runs_each_layer_once_more_in_the_backward_pass(world, tune, recomputed):
    decoder = causal_of(load(world, tune=tune, gradient_checkpointing=recomputed).model).base_model
    runs = []
    for number, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    states_BSD = decoder(input_ids=torch.arange(8).view(1, 8), use_cache=False).last_hidden_state
    assert runs == [0, 1, 2, 3]
    states_BSD.sum().backward()
    assert runs[4:] == ([3, 2, 1, 0] if recomputed else [])


@pytest.mark.parametrize(
    ("modules", "message"),
    [(("q_proj", "query"), "query; no module"), ((), "none is named"), (("q_proj", "lm_head"), "names the LM head")],
)
def test_lora_modules_that_cannot_be_trained_are_refused(world, modules, message):
    with pytest.raises(UsageError, match=message) as caught:
        load(world, lora=LoraConfig(target_modules=modules))
    assert "q_proj" in str(caught.value) or "lm_head" in str(caught.value)


def test_a_head_with_fewer_rows_than_the_vocabulary_is_refused_without_weights(world, tmp_path):
    (tmp_path / "config.json").write_bytes((world.student / "config.json").read_bytes())
    with pytest.raises(IdentityError, match="320 rows, but the cache has targets for 321"):
        load(world, base=tmp_path, vocab_size=321)


def test_pickled_and_incomplete_weights_are_refused(world, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((world.student / "config.json").read_bytes())
    tensors = load_file(world.student / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors"):
        load(world, base=tmp_path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="would be random"):
        load(world, base=tmp_path)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_contradictory_advice_on_generation_neither_stops_a_run_nor_an_export(configured, world, tmp_path, tune):
    """transformers loads such a generation_config.json and refuses to save it, when a stage has been trained."""
    base = tmp_path / "student"
    shutil.copytree(world.student, base)
    advice = {"do_sample": False, "temperature": 0.9, "eos_token_id": [7, 9]}
    (base / "generation_config.json").write_text(json.dumps(advice))
    best = train_stage(configured(student=str(base), tune=tune, stage={"max_steps": 1}), 1, quiet=True).best
    exported = export_student(best, tmp_path / "exported").folder
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [7, 9]
    shrunken_student(str(base), 2, folder=tmp_path / "small", trust_remote_code=False)


def test_a_head_that_scales_or_caps_its_logits_is_matched(tmp_path):
    """Granite divides its logits, Gemma 2 caps them: ours must equal those of the model's own forward pass."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    granite = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=8.0, initializer_range=0.5))
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=2.0, initializer_range=0.5))
    config = TrainConfig(cache="unused", student="unused", out="unused", tune="full")
    for name, model in (("granite", granite), ("gemma", gemma)):
        model.save_pretrained(tmp_path / name)
        origin = Origin(base=str(tmp_path / name))
        student = load_student(
            config, origin, precision=resolve_precision("cpu", "fp32"), vocab_size=60, training=False
        )
        head = student.head()
        assert (head.scale, head.soft_cap) == ((1 / 8, None) if name == "granite" else (1.0, 2.0))
        ids = torch.randint(0, 60, (1, 7))
        with torch.no_grad():
            states = student.model.base_model(input_ids=ids).last_hidden_state[0]
            ours = head.finish(states @ head.weight[:60].T)
            torch.testing.assert_close(ours, student.model(input_ids=ids).logits[0, :, :60])


def test_logits_that_are_changed_in_an_unknown_way_are_refused(world, monkeypatch):
    from transformers import Qwen3ForCausalLM

    forward = Qwen3ForCausalLM.forward

    def doubled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return dataclasses.replace(output, logits=2 * output.logits)

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", doubled)
    with pytest.raises(UsageError, match="Qwen3ForCausalLM does something to its logits"):
        load(world)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="device 'cuda:7' cannot be used"):
        resolve_precision("cuda:7", "auto")
    assert resolve_precision("cpu", "auto").compute_dtype == torch.float32
