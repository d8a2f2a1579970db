"""Protects training on what a cache may hold besides: ids drawn from the teacher, and queries and keys of its heads."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.cache.reader import CacheReader
from distill.config import StageConfig
from distill.errors import IdentityError, UsageError
from distill.student.attention import AttentionLoss
from distill.student.batch import collate, example_of
from distill.student.model import Origin, load_student
from distill.student.objective import Objective, TeacherView, attention_loss_of
from distill.student.precision import resolve_precision
from distill.student.stage import plan_stage
from distill.student.trainer import train_stage
from tests.student.conftest import VOCAB, captured_cache, logged

NUM_SAMPLES, HEADS = 6, {1: (0, 3)}


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory):
    """A cache of the tiny teacher, as capture makes it, with draws and heads."""
    root = tmp_path_factory.mktemp("inner")
    return captured_cache(world, root, num_rows=24, calibration_tokens=100, num_samples=NUM_SAMPLES, heads=HEADS)


@pytest.fixture
def sequences(cache):
    reader = CacheReader.open(cache)
    return [row for commit in reader.commits for row in reader.sequences(commit, "train")]


def stage_of(**changes):
    values = {"shares": {"general": 1}, "temperature": 1.0, "learning_rate": 1e-3, "epochs": 1, "batch_size": 4}
    return StageConfig.model_validate({**values, **changes})


def test_each_trained_token_has_its_own_draws(sequences):
    """Also where only some positions train and the end is cut off."""
    masked = dataclasses.replace(sequences[1].prompt, loss_mask=np.arange(len(sequences[1].prompt.loss_mask)) % 3 == 1)
    rows = [sequences[0], dataclasses.replace(sequences[1], prompt=masked)]
    batch = collate([example_of(row, 15) for row in rows], None)
    expected = []
    for row in rows:
        targets, used = row.targets, 0
        for position in range(len(targets.entropy)):
            stop = used + 1
            while targets.sampled_counts[used:stop].sum() < NUM_SAMPLES:
                stop += 1
            if position < 14 and row.prompt.loss_mask[position]:
                ids, counts = targets.sampled_ids[used:stop].tolist(), targets.sampled_counts[used:stop].tolist()
                expected.append((dict(zip(ids, counts, strict=True)), targets.entropy[position]))
            used = stop
    assert len(expected) == batch.num_trained
    for (draws, entropy), ids, weights, got_entropy in zip(
        expected, batch.sampled.ids, batch.sampled.weights, batch.sampled.entropy, strict=True
    ):
        got = {int(i): round(float(w) * NUM_SAMPLES) for i, w in zip(ids, weights, strict=True) if w > 0}
        assert got == draws
        assert got_entropy == pytest.approx(entropy)


def test_the_teacher_itself_has_nearly_no_attention_loss_and_another_model_has(world, cache, sequences, configured):
    reader = CacheReader.open(cache)
    precision = resolve_precision("cpu", "fp32")
    config = configured(cache=str(cache))
    stage = stage_of(weights={"kl": 0, "attention": 1}, attention={"layers": {1: 1}, "heads": {0: 0, 3: 3}})
    values = {}
    for name in ("teacher", "student"):
        origin = Origin(base=str(getattr(world, name)))
        student = load_student(
            config, origin, precision=precision, vocab_size=reader.identity.vocab_size, training=False
        )
        view = TeacherView.of(reader, precision)
        attention = attention_loss_of(student, view, stage)
        objective = Objective(student, view, stage, adapter=None, head_chunk=16, attention=attention)
        apart = collate([example_of(row, 20) for row in sequences[:3]], None)
        packed = collate([example_of(row, 20) for row in sequences[:3]], None, row_length=50)
        with torch.no_grad():
            values[name] = float(objective(apart).named["attention"]) / apart.num_trained
            in_rows = float(objective(packed).named["attention"]) / apart.num_trained
        assert in_rows == pytest.approx(values[name], rel=1e-3, abs=1e-7)
    assert values["teacher"] < 1e-3
    assert values["student"] > 20 * values["teacher"]


def test_a_run_asks_each_attention_layer_once(cache, configured, monkeypatch):
    """What trains also evaluates: a second hook would leave a graph of queries and keys behind in every step."""
    asked = []
    keeper = AttentionLoss._keeper

    def counted(self, layer):
        asked.append(layer)
        return keeper(self, layer)

    monkeypatch.setattr(AttentionLoss, "_keeper", counted)
    stage = {"weights": {"kl": 0.5, "ce": 0.2, "attention": 0.3}, "max_steps": 1}
    result = train_stage(configured(cache=str(cache), stage=stage), 1, quiet=True)
    assert asked == [3]
    assert result.evaluation.overall.attention > 0


def test_a_stage_trains_on_draws_and_attention(cache, configured):
    stage = {
        "tail": "sampled",
        "temperature": 1.0,
        "weights": {"kl": 0.5, "ce": 0.2, "attention": 0.3},
        "max_steps": 8,
        "balance": True,
    }
    config = configured(cache=str(cache), stage=stage, tune="lora", gradient_checkpointing=True)
    result = train_stage(config, 1, quiet=True)
    run = Path(config.out)
    assert all({"kl", "ce", "attention"} <= set(line["losses"]) for line in logged(run, "train"))
    measured = [line["overall"]["attention"] for line in logged(run, "eval")]
    assert measured[-1] < measured[0]
    assert result.evaluation.overall.attention == measured[-1]


def test_a_step_on_draws_has_the_loss_that_they_estimate(world, cache, sequences, configured):
    """On all rows, by the plain formula of its definition, and not that of the top-k, which the cache holds as well."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world.student, dtype=torch.float32)
    expected, tokens = 0.0, 0
    for row in sequences:
        with torch.no_grad():
            logits_SV = model(torch.tensor(row.prompt.input_ids[None]).long()).logits[0, :-1, :VOCAB]
        log_q_SV = logits_SV.double().log_softmax(-1).numpy()
        ids, counts, targets = row.targets.sampled_ids, row.targets.sampled_counts, row.targets
        position = (np.cumsum(counts) - 1) // NUM_SAMPLES
        trained = np.flatnonzero(row.prompt.loss_mask)
        drawn = np.isin(position, trained)
        expected -= (counts[drawn] * log_q_SV[position[drawn], ids[drawn]]).sum() / NUM_SAMPLES
        expected -= targets.entropy[trained].astype(np.float64).sum()
        tokens += len(trained)
    losses = {}
    for tail in ("sampled", "bucket"):
        stage = {"tail": tail, "temperature": 1.0, "weights": {"kl": 1}, "max_steps": 1, "batch_size": len(sequences)}
        config = configured(cache=str(cache), stage=stage, out=str(Path(configured().out) / tail))
        train_stage(config, 1, quiet=True)
        [line] = logged(Path(config.out), "train")
        assert line["tokens"] == tokens
        losses[tail] = line["losses"]["kl"]
    assert losses["sampled"] == pytest.approx(expected / tokens, rel=1e-5)
    assert losses["bucket"] != pytest.approx(losses["sampled"], rel=1e-2)


def test_without_draws_nothing_takes_their_place(world, cache, sequences, configured):
    reader, precision = CacheReader.open(cache), resolve_precision("cpu", "fp32")
    student = load_student(
        configured(), Origin(base=str(world.student)), precision=precision, vocab_size=VOCAB, training=False
    )
    objective = Objective(
        student,
        TeacherView.of(reader, precision),
        stage_of(tail="sampled", weights={"kl": 1}),
        adapter=None,
        head_chunk=16,
    )
    bare = [dataclasses.replace(example_of(row, 20), sampled=None) for row in sequences[:2]]
    with pytest.raises(AssertionError, match="a cache without draws"):
        objective(collate(bare, None))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"temperature": 2.0}, IdentityError, "say nothing about others"),
        ({"temperature": [2, 1]}, IdentityError, "say nothing about others"),
        ({"divergence": "reverse"}, UsageError, "only the forward divergence"),
    ],
)
def test_draws_serve_temperature_one_and_the_forward_divergence_alone(cache, configured, changes, error, words):
    config = configured(cache=str(cache), stage={"tail": "sampled", "temperature": 1.0, **changes})
    with pytest.raises(error, match=words):
        plan_stage(config, 1, CacheReader.open(cache))
