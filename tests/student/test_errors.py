"""What a user can get wrong with a student, a run or its caches, beside what the tests of each part have.

What it protects: the class, hence the exit code, and the words that name the mistake and the way out.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.cache.reader import CacheReader
from distill.data.chat import ChatTemplate
from distill.errors import CorruptionError, DataError, StorageError, UsageError
from distill.student.adapter import with_adapter
from distill.student.benchmarks import run_tasks
from distill.student.choices import scored_choice
from distill.student.evaluate import Subject, held_out_figures
from distill.student.export import export_student
from distill.student.layers import chosen_layers
from distill.student.model import _head_of
from distill.student.objective import _inner_pairs, _teacher_layers
from distill.student.origin import origin_of, settings_of_adapter
from distill.student.precision import resolve_precision
from distill.student.ranks import Ranks
from distill.student.sharding import shard
from distill.student.shrink import keep_layers, shrunken_student
from distill.student.stage import plan_stage
from distill.student.trainer import train_stage
from tests.student.conftest import save_model

LORA = {"r": 4, "dropout": 0.0, "target_modules": ["q_proj"]}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def reader(world):
    return CacheReader.open(world.cache)


@pytest.mark.parametrize(
    ("stage", "number", "says"),
    [
        ({"weight_schedules": {"kll": {"start": 1}}}, 1, "weight_schedules: there is no loss kll. Use kl, ce"),
        ({}, 4, "Use --stage 1, 2, 3 or 1-3"),
    ],
)
def test_stages_that_do_not_exist(configured, reader, stage, number, says):
    with pytest.raises(UsageError, match=says):
        plan_stage(configured(stage=stage), number, reader)


@pytest.mark.parametrize(
    ("device", "says"),
    [("cuda:1", "device is cuda:1, but 2 processes train together"), ("cuda", "process 99 of this machine has no GPU")],
)
def test_devices_that_ranks_cannot_share(device, says):
    with pytest.raises(UsageError, match=says):
        Ranks(rank=1, world=2, local=99).device(device)


def test_rows_that_are_cut_before_their_answer(configured, reader):
    config = configured(max_length=4, layer_choice="loss", student_layers=2)
    with pytest.raises(DataError, match="has no train row with a trained token, so nothing tells which layers"):
        chosen_layers(config, reader)
    subject = Subject.load(configured(), reader=reader)
    with pytest.raises(DataError, match="has no held-out sequence with a trained token"):
        held_out_figures(subject.student, reader, config)


def test_layers_that_are_not_where_the_configuration_says(world):
    odd = load(world.student)
    odd.config.num_hidden_layers = 5
    with pytest.raises(UsageError, match="student_layers: no list of 5 layers was found in Qwen3Model"):
        keep_layers(odd, 3)
    with pytest.raises(UsageError, match="Qwen3ForCausalLM keeps its layers where distill does not find them"):
        shard(odd, odd.model, resolve_precision("cpu", "fp32"), Ranks(rank=0, world=2, local=0))


def test_inner_layers_that_are_not_there(configured, reader):
    student = Subject.load(configured(), reader=reader).student
    stage = configured(stage={"weights": {"feature": 1}, "feature": {"layers": {3: 9}}}).stage(1)
    with pytest.raises(
        UsageError, match=r"feature\.layers names layer 3 of the teacher, but the cache keeps states of"
    ):
        _inner_pairs(stage, reader.projection, 4, student)
    kept = replace(reader.projection, layers={3: None})
    with pytest.raises(UsageError, match=r"feature\.layers pairs layer 3 of the teacher with layer 9 of the student"):
        _inner_pairs(stage, kept, 4, student)
    student.model.config.num_hidden_layers = 5
    with pytest.raises(UsageError, match="so its inner states cannot be compared with the teacher's"):
        student.watch([1])


def test_a_head_that_is_no_linear_layer(world):
    odd = load(world.student)
    odd.set_output_embeddings(nn.Bilinear(2, 2, 2))
    with pytest.raises(UsageError, match="Qwen3ForCausalLM has no plain linear LM head on a decoder of its own"):
        _head_of(odd, 300, resolve_precision("cpu", "fp32"))


def test_folders_that_a_smaller_student_cannot_have(world, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    for folder, error, says in (
        (tmp_path / "file" / "student", StorageError, "cannot write the shrunken student to"),
        (tmp_path / "mine", UsageError, "exists but distill.json in it cannot be read"),
    ):
        with pytest.raises(error, match=says):
            shrunken_student(str(world.student), 2, folder=folder, trust_remote_code=False)


def test_adapters_that_are_damaged_or_of_another_model(world, tmp_path):
    save_model(tmp_path / "other", seed=3, hidden_size=32)
    get_peft_model(
        load(tmp_path / "other"), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CorruptionError, match=r"the adapter in .* does not fit its base model"):
        with_adapter(load(world.student), tmp_path / "adapter", trainable=False)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CorruptionError, match=r"the adapter in .* does not fit its base model: "):
        with_adapter(load(world.student), tmp_path / "adapter", trainable=False)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no adapter_model\.safetensors; adapters of another format"):
        with_adapter(load(world.student), tmp_path / "adapter", trainable=False)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CorruptionError, match="does not name the base model of the adapter"):
        origin_of(tmp_path / "adapter")
    assert settings_of_adapter(tmp_path / "adapter") is None


def test_a_checkpoint_outside_its_run_and_an_export_that_cannot_be_written(configured, tmp_path):
    config = configured(tune="lora", lora=LORA, student_layers=2, stage={"max_steps": 1})
    best = train_stage(config, 1, quiet=True).best
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the exported student to"):
        export_student(best, tmp_path / "file" / "model")
    moved = shutil.copytree(best, tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"is an adapter for .* in the folder of its run, which is not there"):
        origin_of(moved)


@pytest.mark.parametrize("content", [None, "{}", "[]"])
def test_a_teacher_that_does_not_say_its_layers(world, tmp_path, content):
    copy = shutil.copytree(world.cache, tmp_path / "cache")
    if content is not None:
        (copy / "teacher" / "config.json").write_text(content)
    with pytest.raises(CorruptionError, match=r"teacher/config\.json does not say how many layers the teacher has"):
        _teacher_layers(CacheReader.open(copy))


def test_choices_that_the_student_cannot_be_asked(world):
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    with pytest.raises(DataError, match=r"no token of ' ' is left to score as the answer to 'w3'. Leave"):
        scored_choice("w3", " ", tokenizer, None)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {% endfor %}"
    with pytest.raises(DataError, match="cannot ask 'w3' with the choice 'w4': "):
        scored_choice("w3", "w4", tokenizer, ChatTemplate(tokenizer))


def test_a_task_whose_data_is_not_there(configured, world, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'distill[lm-eval]'")
    (tmp_path / "gone.yaml").write_text(
        json.dumps(
            {
                "task": "gone",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "gone.jsonl")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{answer}}",
            }
        )
    )
    folder = shutil.copytree(world.student, tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(folder)
    subject = Subject.load(configured(student=str(folder)), reader=None)
    with pytest.raises(UsageError, match="lm-eval cannot run gone: "):
        run_tasks(subject.student, subject.tokenizer, ["gone"], folder=tmp_path)
