"""Protects adapters that a student begins from: none is changed, or left out, in silence."""

import json
import shutil

import peft
import pytest
import torch

from distill.errors import CorruptionError, IdentityError, UsageError
from distill.student.evaluate import evaluate_model
from distill.student.export import export_student
from distill.student.model import Origin, causal_of, load_causal, load_student
from distill.student.precision import resolve_precision
from distill.student.trainer import train_stage
from tests.student.conftest import save_model

LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "up_proj"]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 8}, r"lora\.r is 8, but .* goes on with the adapter in .*stage1/best/model, whose r is 4"),
        ({"alpha": 9}, "whose alpha is 8"),
        ({"dropout": 0.5}, r"whose dropout is 0\.0"),
        ({"target_modules": ["q_proj"]}, r"whose target_modules is q_proj, up_proj\. .* `distill export`"),
        ({"target_modules": ["q_proj", "up_proj", "down_proj"]}, "whose target_modules is q_proj, up_proj"),
    ],
)
def test_a_later_stage_cannot_ask_for_another_adapter(configured, changes, says):
    train_stage(configured(tune="lora", lora=LORA, stage={"max_steps": 1}), 1, quiet=True)
    with pytest.raises(UsageError, match=says):
        train_stage(configured(tune="lora", lora={**LORA, **changes}), 2, quiet=True)


def test_what_the_user_does_not_ask_for_is_the_adapters(configured, world, tmp_path):
    """An adapter from elsewhere need not have our defaults; full names and short ones mean the same modules."""
    model = load_causal(str(world.student), dtype=torch.float32, trust_remote_code=False)
    model.name_or_path = str(world.student)
    settings = peft.LoraConfig(r=2, target_modules=["self_attn.q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "mine")
    config = configured(tune="lora", lora={"target_modules": ["q_proj"]}, stage={"max_steps": 1})
    best = train_stage(config, 1, start=tmp_path / "mine", quiet=True).best
    assert json.loads((best / "model" / "adapter_config.json").read_text())["r"] == 2


def test_a_base_that_changed_beneath_its_adapter_is_refused(configured, world, tmp_path):
    """A folder that was trained on, or a hub's newer revision under the same name: the adapter means nothing on it."""
    base = tmp_path / "student"
    shutil.copytree(world.student, base)
    config = configured(student=str(base), tune="lora", lora=LORA, stage={"max_steps": 1})
    best = train_stage(config, 1, quiet=True).best
    assert evaluate_model(config, best).overall.num_tokens > 0
    save_model(base, seed=9, num_hidden_layers=4)
    for use in (
        lambda: train_stage(config, 2, quiet=True),
        lambda: evaluate_model(config, best),
        lambda: export_student(best, tmp_path / "exported"),
    ):
        with pytest.raises(IdentityError, match=r"student are not those that the adapter in .*best/model was trained"):
            use()
    shutil.copytree(world.student, base, dirs_exist_ok=True)
    assert train_stage(config, 2, quiet=True).stage == 2


def adapted(base, folder, **settings):
    """An adapter of another kind than ours, with something to say."""
    torch.manual_seed(0)
    model = load_causal(str(base), dtype=torch.float32, trust_remote_code=False)
    wanted = peft.LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings})
    model = peft.get_peft_model(model, wanted)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if any(part in name for part in ("lora_B", "lora_embedding_A", "modules_to_save")):
                value.normal_()
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_head_is_not_left_out(configured, world, tmp_path, settings):
    """Our losses multiply with the head themselves. Merged it counts: for a full fine-tuning, and in an export."""
    adapter = adapted(world.teacher, tmp_path / "adapter", **settings)
    origin = Origin(base=str(world.teacher), adapter=adapter)
    parts = {"precision": resolve_precision("cpu", "fp32"), "vocab_size": 300}
    with pytest.raises(UsageError, match="LM head on a decoder of its own, without an adapter"):
        load_student(configured(tune="lora"), origin, training=False, **parts)
    full = load_student(configured(), origin, training=True, **parts)
    exported = export_student(adapter, tmp_path / "plain").folder
    plain = load_causal(str(exported), dtype=torch.float32, trust_remote_code=False)
    torch.testing.assert_close(full.head().weight, plain.lm_head.weight)
    assert full.head().weight is causal_of(full.model).lm_head.weight


EMBEDDING = {"target_modules": ["q_proj", "embed_tokens"]}


def test_low_ranks_on_a_tied_embedding_are_refused_before_training(configured):
    """They would train, beside a head that stays what it was; no plain model says the same."""
    says = r"names model\.embed_tokens, whose weight is that of lm_head too \(tie_word_embeddings\)"
    with pytest.raises(UsageError, match=says):
        train_stage(configured(tune="lora", lora=EMBEDDING), 1, quiet=True)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_an_adapter_on_a_tied_embedding_is_neither_trained_nor_merged(configured, world, tmp_path):
    adapter = adapted(world.student, tmp_path / "adapter", **EMBEDDING)
    for use in (
        lambda: train_stage(configured(tune="lora", lora=LORA), 1, start=adapter, quiet=True),
        lambda: train_stage(configured(), 1, start=adapter, quiet=True),
        lambda: export_student(adapter, tmp_path / "plain"),
    ):
        with pytest.raises(UsageError, match=r"adapter in .*adapter changes model\.embed_tokens, whose weight is that"):
            use()
    assert evaluate_model(configured(), adapter).overall.num_tokens > 0


def test_low_ranks_on_an_embedding_of_its_own_are_merged(configured, world, tmp_path, monkeypatch):
    config = configured(student=str(world.teacher), tune="lora", lora=EMBEDDING, stage={"max_steps": 2})
    best = train_stage(config, 1, quiet=True).best
    assert export_student(best, tmp_path / "plain", dtype="bfloat16").logit_error < 0.05
    monkeypatch.setattr(peft.tuners.lora.Embedding, "merge", lambda *_, **__: None)
    with pytest.raises(CorruptionError, match=r"the weights of model\.embed_tokens are off by"):
        export_student(best, tmp_path / "unmerged", dtype="bfloat16")
    with pytest.raises(CorruptionError, match=r"the weights of model\.embed_tokens are off by"):
        train_stage(configured(student=str(world.teacher)), 2, start=best, quiet=True)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("whole", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_whole_copies_of_tied_layers_are_untied_in_an_export(world, tmp_path, whole):
    adapter = adapted(world.student, tmp_path / "adapter", modules_to_save=whole)
    exported = export_student(adapter, tmp_path / "plain")
    assert exported.logit_error < 1e-5
    assert json.loads((exported.folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_weights_decomposed_into_length_and_direction_are_merged(world, tmp_path):
    """Another kind of low rank (DoRA), whose merge is no sum."""
    adapter = adapted(world.student, tmp_path / "adapter", use_dora=True)
    assert export_student(adapter, tmp_path / "plain").logit_error < 1e-5
    assert export_student(adapter, tmp_path / "rounded", dtype="bfloat16").logit_error < 0.05
