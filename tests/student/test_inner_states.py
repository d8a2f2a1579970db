"""Protects the feature loss on inner layers: aligned with what capture kept, trained, saved, resumed and refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill.cache.reader import CacheReader
from distill.config import StageConfig
from distill.errors import UsageError
from distill.student.batch import collate, example_of
from distill.student.model import Origin, load_student
from distill.student.objective import TeacherView, feature_adapter_of, feature_sum
from distill.student.precision import resolve_precision
from distill.student.shrink import evenly_spaced, same_depth
from distill.student.trainer import train_stage
from tests.student.conftest import logged

LAYERS = (0, 1)


def student_of(config, folder, reader):
    precision = resolve_precision("cpu", "fp32")
    vocab_size = reader.identity.vocab_size
    return load_student(config, Origin(base=str(folder)), precision=precision, vocab_size=vocab_size, training=False)


def stage_of(**feature):
    return StageConfig(
        shares={"general": 1},
        temperature=1.0,
        learning_rate=1e-3,
        epochs=1,
        batch_size=4,
        weights={"kl": 0, "feature": 1},
        feature=feature,
    )


@pytest.mark.parametrize("row_length", [None, 50])
def test_the_teacher_itself_has_the_states_that_the_cache_keeps(world, inner_cache, configured, row_length):
    """Padded and packed, cut off, and with only some positions trained."""
    reader = CacheReader.open(inner_cache)
    student = student_of(configured(cache=str(inner_cache)), world.teacher, reader)
    view = TeacherView.of(reader, student.precision)
    adapter = feature_adapter_of(student, view, stage_of())
    assert adapter.pairs == {0: 0, 1: 1}
    rows = [row for commit in reader.commits for row in reader.sequences(commit, "train")][:5]
    rows[1].prompt.loss_mask.setflags(write=True)
    rows[1].prompt.loss_mask[::2] = False
    batch = collate([example_of(row, 9 + 3 * n) for n, row in enumerate(rows)], view.projection, row_length=row_length)
    with torch.no_grad():
        student.hidden(batch)
    inputs = student.take_inputs(batch)
    assert int(batch.at_start.sum()) == 4
    later = ~batch.at_start
    for place, layer in enumerate(LAYERS):
        levels = view.projection.layers[layer].quantise(inputs[layer].numpy())
        off = np.abs(levels[later].astype(int) - batch.inner[later, place].numpy().astype(int))
        assert off.max() <= 1  # a rounding apart
        assert (off == 0).mean() > 0.95
    assert student.take_inputs(batch) == {}


def test_pairs_are_those_that_pruning_makes():
    for total, kept in ((30, 3), (30, 4), (12, 12), (24, 7)):
        pruned = evenly_spaced(total, kept)
        assert [same_depth(layer, teacher_layers=total, student_layers=kept) for layer in pruned] == list(range(kept))
    assert same_depth(7, teacher_layers=30, student_layers=1) == 0


def test_the_loss_alone_brings_the_student_nearer(inner_cache, configured, tmp_path):
    """Under LoRA with recomputed layers, which call every hook twice; maps are trained, saved and read again."""
    stage = {"temperature": 1.0, "weights": {"kl": 0, "ce": 0, "feature": 1}, "learning_rate": 1e-2, "max_steps": 24}
    runs = {}
    for layers in ("auto", "none"):
        config = configured(
            cache=str(inner_cache),
            stage={**stage, "feature": {"layers": layers}},
            tune="lora",
            gradient_checkpointing=True,
        ).model_copy(update={"out": str(tmp_path / layers)})
        train_stage(config, 1, quiet=True)
        values = [line["overall"]["feature"] for line in logged(Path(config.out), "eval")]
        assert values[-1] < 0.9 * values[0]
        runs[layers] = load_file(Path(config.out, "stage1", "last", "feature.safetensors"))
    assert set(runs["auto"]) - set(runs["none"]) == {
        f"inner.layer{n}.{part}" for n in LAYERS for part in ("weight", "bias")
    }
    assert all(value.any() for value in runs["auto"].values())


def test_gradients_reach_the_layers_before_a_pair_and_no_others(inner_cache, world, configured):
    reader = CacheReader.open(inner_cache)
    student = student_of(configured(cache=str(inner_cache)), world.student, reader)
    student.model.requires_grad_(True)
    adapter = feature_adapter_of(student, TeacherView.of(reader, student.precision), stage_of(layers={0: 1}))
    torch.nn.init.normal_(adapter.inner["layer0"].weight)
    for parameter in adapter.down.parameters():
        torch.nn.init.zeros_(parameter)  # the final state then has no gradient
    row = next(iter(reader.sequences(reader.commits[0], "train")))
    batch = collate([example_of(row, 20)], reader.projection)
    feature_sum(adapter, student, student.hidden(batch), batch).backward()
    layers = student.model.model.layers
    assert all(bool(value.grad.any()) for value in layers[0].parameters())
    assert not any(value.grad is not None and bool(value.grad.any()) for value in layers[1].parameters())


@pytest.mark.parametrize(
    ("layers", "words"),
    [({5: 0}, "the cache keeps states of 0, 1"), ({1: 9}, "layer 9 of the student, which has layers 0 to")],
)
def test_pairs_of_layers_that_are_not_there_are_refused(inner_cache, world, configured, layers, words):
    reader = CacheReader.open(inner_cache)
    student = student_of(configured(cache=str(inner_cache)), world.student, reader)
    with pytest.raises(UsageError, match=words):
        feature_adapter_of(student, TeacherView.of(reader, student.precision), stage_of(layers=layers))


def test_a_student_whose_layers_are_not_found_is_refused(inner_cache, world, configured):
    reader = CacheReader.open(inner_cache)
    student = student_of(configured(cache=str(inner_cache)), world.student, reader)
    decoder = student.model.model
    decoder.layers = torch.nn.Sequential(*decoder.layers)
    with pytest.raises(UsageError, match=r"no list of 4 layers .* Set feature\.layers to none"):
        feature_adapter_of(student, TeacherView.of(reader, student.precision), stage_of())
