"""Protects adapters that a student begins from: none is changed, or left out, in silence."""

import json
import shutil

import peft
import pytest
import torch

from distill.errors import IdentityError, UsageError
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


def adapted(world, folder, **settings):
    """An adapter that changes the LM head of the student, which is not tied here."""
    torch.manual_seed(0)
    model = load_causal(str(world.teacher), dtype=torch.float32, trust_remote_code=False)
    wanted = peft.LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings})
    model = peft.get_peft_model(model, wanted)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                value.normal_()
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_head_is_not_left_out(configured, world, tmp_path, settings):
    """Our losses multiply with the head themselves. Merged it counts: for a full fine-tuning, and in an export."""
    adapter = adapted(world, tmp_path / "adapter", **settings)
    origin = Origin(base=str(world.teacher), adapter=adapter)
    parts = {"precision": resolve_precision("cpu", "fp32"), "vocab_size": 300}
    with pytest.raises(UsageError, match="LM head on a decoder of its own, without an adapter"):
        load_student(configured(tune="lora"), origin, training=False, **parts)
    full = load_student(configured(), origin, training=True, **parts)
    exported = export_student(adapter, tmp_path / "plain").folder
    plain = load_causal(str(exported), dtype=torch.float32, trust_remote_code=False)
    torch.testing.assert_close(full.head().weight, plain.lm_head.weight)
    assert full.head().weight is causal_of(full.model).lm_head.weight
