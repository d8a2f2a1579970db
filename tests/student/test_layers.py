"""Protects the choice of layers by loss: each try measures the model that would be left, and the best one is begun
with."""

import json
import shutil

import pytest
import torch

from distill.cache.reader import CacheReader
from distill.config import TrainConfig
from distill.errors import IdentityError, UsageError
from distill.student.batch import collate, example_of
from distill.student.evaluate import evaluate_model
from distill.student.layers import chosen_layers, least_missed
from distill.student.model import Origin, Student, causal_of, load_causal, load_student
from distill.student.precision import resolve_precision
from distill.student.shrink import keep_layers
from distill.student.trainer import train_stage
from tests.student.conftest import VOCAB, save_model, save_tokenizer, words


def load(folder) -> Student:
    config = TrainConfig.model_validate({"cache": "unused", "student": str(folder), "out": "unused"})
    precision = resolve_precision("cpu", "fp32")
    return load_student(config, Origin(base=str(folder)), precision=precision, vocab_size=VOCAB, training=False)


def batches_of(cache, num=2):
    """Batches of four rows each, of different lengths."""
    reader = CacheReader.open(cache)
    examples = [
        example_of(row, 24 - index) for index, row in enumerate(reader.sequences(reader.commits[0], "train")[: 4 * num])
    ]
    return [collate(examples[start : start + 4], reader.projection) for start in range(0, len(examples), 4)]


def loss_of(student):
    """Cross-entropy by the model's own logits."""

    def loss(batch):
        logits_BSV = causal_of(student.model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        chosen_NV = logits_BSV.flatten(0, 1)[batch.trained, :VOCAB]
        return float(torch.nn.functional.cross_entropy(chosen_NV.double(), batch.labels, reduction="sum"))

    return loss


def pruned_by_hand(folder, batches, num):
    """The same greedy choice, with a model loaded and cut anew for each try."""
    total = load_causal(str(folder), dtype=torch.float32, trust_remote_code=False).config.num_hidden_layers
    kept = list(range(total))
    while len(kept) > num:
        harm = {}
        for layer in kept:
            student = load(folder)
            keep_layers(student.model, [number for number in kept if number != layer])
            with torch.no_grad():
                harm[layer] = sum(map(loss_of(student), batches))
        kept.remove(min(kept, key=harm.__getitem__))
    return kept, harm


def bloom(folder):
    """A tiny model of the kind whose layers give a tuple."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    BloomForCausalLM(
        BloomConfig(vocab_size=320, hidden_size=32, n_layer=4, n_head=4, initializer_range=0.3)
    ).save_pretrained(folder)
    save_tokenizer(folder, words())
    return folder


@pytest.mark.parametrize("kind", ["qwen3", "bloom"])
def test_each_try_is_the_model_that_would_be_left(world, tmp_path, kind):
    folder = world.student if kind == "qwen3" else bloom(tmp_path / "bloom")
    batches = batches_of(world.cache)
    student = load(folder)
    loss, tried = loss_of(student), []

    def recorded(batch):
        tried.append(loss(batch))
        return tried[-1]

    with torch.no_grad():
        before = sum(map(loss, batches))
    kept, harm = pruned_by_hand(folder, batches, 2)
    assert least_missed(student, batches, recorded, num=2) == kept
    # the last round: for each batch a run of three layers, and one without each of them
    last = tried[-8:]
    assert [last[1 + n] + last[5 + n] for n in range(3)] == pytest.approx(list(harm.values()), rel=1e-5)
    with torch.no_grad():
        assert sum(map(loss, batches)) == pytest.approx(before, rel=1e-6)  # the model is as it was


@pytest.fixture
def padded_out(world, tmp_path):
    """The teacher between two layers that do nothing: evenly spaced, just the wrong ones are kept."""
    folder = tmp_path / "idle"
    teacher = load_causal(str(world.teacher), dtype=torch.float32, trust_remote_code=False)
    model = save_model(folder, seed=0, num_hidden_layers=4, tie_word_embeddings=False)
    with torch.no_grad():
        for number in (0, 3):
            model.model.layers[number].self_attn.o_proj.weight.zero_()
            model.model.layers[number].mlp.down_proj.weight.zero_()
        for number in (1, 2):
            model.model.layers[number].load_state_dict(teacher.model.layers[number - 1].state_dict())
        for name in ("model.embed_tokens", "model.norm", "lm_head"):
            model.get_submodule(name).load_state_dict(teacher.get_submodule(name).state_dict())
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("hidden", [True, False])
def test_training_begins_with_the_layers_that_matter(configured, padded_out, tmp_path, bare_cache, hidden):
    settings = {"student": str(padded_out), "stage": {"max_steps": 1, "eval_every": 1}}
    if not hidden:
        settings |= {"cache": str(bare_cache), "stage": {**settings["stage"], "temperature": 2.0, "tail": "bucket"}}
    train_stage(configured(**settings, student_layers=2, layer_choice="loss", layer_positions=99), 1, quiet=True)
    folder = tmp_path / "run" / "student"
    record = json.loads((folder / "distill.json").read_text())
    assert (record["layers"], record["layer_choice"]) == ([1, 2], "loss")
    whole, small = (evaluate_model(configured(**settings), model).overall for model in (padded_out, folder))
    assert small.ce == pytest.approx(whole.ce, rel=1e-5)
    shutil.rmtree(tmp_path / "run" / "stage1")
    with pytest.raises(UsageError, match="layer_choice loss, and even"):
        train_stage(configured(**settings, student_layers=2), 1, quiet=True)


def test_a_temperature_that_the_cache_lacks_is_refused(configured, bare_cache):
    config = configured(cache=str(bare_cache), student_layers=2, layer_choice="loss")
    with pytest.raises(IdentityError, match="temperature"):
        chosen_layers(config, CacheReader.open(bare_cache))
