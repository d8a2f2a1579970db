"""Protects training: every loss really falls, stages follow each other, a run resumes, is recognised, or is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill.cache.reader import CacheReader
from distill.errors import DataError, RetryError, StorageError, UsageError
from distill.student import checkpoint, trainer
from distill.student.checkpoint import Best, State
from distill.student.learner import Learner
from distill.student.losses.feature import feature_floor
from distill.student.trainer import train_stage
from tests.student.conftest import LENGTH, logged, room_for, save_model, stop_at, without_times

LONGER = {"max_steps": 30, "eval_every": 10, "learning_rate": 1e-2, "temperature": 2.0}


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.mark.parametrize("tail", ["low_rank", "bucket"])
def test_kl_alone_brings_the_student_to_the_teacher(configured, run, tail):
    result = train_stage(configured(stage={**LONGER, "tail": tail, "weights": {"kl": 1, "ce": 0}}), 1, quiet=True)
    evals = logged(run, "eval")
    assert [line["step"] for line in evals] == [0, 10, 20, 30]
    before, after = evals[0]["overall"]["kl"], evals[-1]["overall"]["kl"]
    assert after["2.0"] < 0.3 * before["2.0"]
    assert after["1.0"] < 0.3 * before["1.0"]
    assert result.objective == pytest.approx(4 * min(line["overall"]["kl"]["2.0"] for line in evals[1:]))
    assert set(logged(run, "train")[0]["losses"]) == {"total", "kl"}


@pytest.mark.parametrize("divergence", ["reverse", "js", "skew"])
def test_every_divergence_alone_falls_and_chooses_the_best(configured, run, divergence):
    stage = {**LONGER, "weights": {"kl": 1, "ce": 0}, "divergence": divergence}
    result = train_stage(configured(stage=stage), 1, quiet=True)
    evals = logged(run, "eval")
    assert evals[-1]["objective"] < 0.5 * evals[0]["objective"]
    assert result.objective == pytest.approx(4 * result.evaluation.overall.divergence)
    assert result.objective == min(line["objective"] for line in evals[1:])


def test_a_low_rank_tail_teaches_more_than_a_bucket_at_high_temperature(configured, tmp_path):
    final = {}
    for tail in ("low_rank", "bucket"):
        stage = {**LONGER, "temperature": 4.0, "tail": tail, "weights": {"kl": 1, "ce": 0}}
        result = train_stage(configured(stage=stage, out=str(tmp_path / tail)), 1, quiet=True)
        final[tail] = result.evaluation.overall.kl[4.0]
    assert final["low_rank"] < 0.5 * final["bucket"]


def test_cross_entropy_alone_falls(configured, run):
    train_stage(configured(stage={**LONGER, "weights": {"kl": 0, "ce": 1}}), 1, quiet=True)
    evals = logged(run, "eval")
    assert evals[-1]["overall"]["ce"] < 0.7 * evals[0]["overall"]["ce"]
    assert evals[-1]["objective"] == evals[-1]["overall"]["ce"]
    assert set(logged(run, "train")[0]["losses"]) == {"total", "ce"}


def test_the_feature_loss_alone_falls_towards_its_floor(configured, run, world):
    train_stage(configured(stage={**LONGER, "weights": {"kl": 0, "ce": 0, "feature": 1}}), 1, quiet=True)
    values = [line["overall"]["feature"] for line in logged(run, "eval")]
    floor = feature_floor(CacheReader.open(world.cache).projection)
    early, late = (
        load_file(run / "stage1" / "checkpoints" / f"step-{step}" / "feature.safetensors") for step in (20, 30)
    )
    assert not torch.equal(early["down.weight"], late["down.weight"])  # the adapter learns as well
    assert floor < values[-1] < 0.6 * values[0]
    assert 0 < floor < 0.05


def test_sequences_can_be_told_apart_from_those_of_their_own_domain_only(configured, tmp_path):
    """One sequence of each domain: there is nothing left to tell it apart from."""
    stage = {"max_steps": 1, "batch_size": 2, "shares": {"general": 1, "medical": 1}}
    stage["weights"] = {"kl": 0, "ce": 0, "contrastive": 1}
    found = {}
    for negatives in ("all", "domain"):
        changed = {**stage, "contrastive_negatives": negatives}
        train_stage(configured(stage=changed, out=str(tmp_path / negatives)), 1, quiet=True)
        found[negatives] = logged(tmp_path / negatives, "train")[0]["losses"]["contrastive"]
    assert found["all"] > 0.1
    assert found["domain"] == 0
    more = {**stage, "batch_size": 8, "contrastive_negatives": "domain"}
    train_stage(configured(stage=more, out=str(tmp_path / "more")), 1, quiet=True)
    assert logged(tmp_path / "more", "train")[0]["losses"]["contrastive"] > 0.1


def test_the_contrastive_loss_alone_falls_and_chooses_the_best(configured, run):
    stage = {**LONGER, "learning_rate": 3e-3, "weights": {"kl": 0, "ce": 0, "contrastive": 1}}
    result = train_stage(configured(stage=stage), 1, quiet=True)
    values = [line["overall"]["contrastive"] for line in logged(run, "eval")]
    assert values[-1] < 0.6 * values[0]
    assert result.objective == min(values[1:])
    train = logged(run, "train")
    assert set(train[0]["losses"]) == {"total", "contrastive"}
    assert train[0]["losses"]["contrastive"] > math.log(8)  # eight candidates, at first no better than chance
    assert sum(line["losses"]["contrastive"] for line in train[-5:]) / 5 < math.log(8) / 2
    assert "feature.safetensors" in checkpoint.read_state(run / "stage1" / "best").files


def test_one_sequence_has_nothing_to_contrast_with(configured, run):
    stage = {"weights": {"kl": 0, "ce": 0, "contrastive": 1}, "batch_size": 1, "max_steps": 3}
    train_stage(configured(stage=stage), 1, quiet=True)
    assert [(line["losses"]["contrastive"], line["grad_norm"]) for line in logged(run, "train")] == [(0, 0)] * 3


def test_losses_are_means_over_the_tokens_of_the_step_whatever_the_micro_batches(configured, tmp_path):
    """The first step's loss and gradient do not depend on how it was cut up."""
    first = []
    for tokens in (24, 4096):
        stage = {"max_steps": 1, "weights": {"kl": 0.7, "ce": 0.3, "feature": 0.2, "contrastive": 0.1}}
        config = configured(out=str(tmp_path / str(tokens)), micro_batch_tokens=tokens, stage=stage)
        train_stage(config, 1, quiet=True)
        first.append(logged(tmp_path / str(tokens), "train")[0])
    assert first[0]["losses"] == pytest.approx(first[1]["losses"], rel=1e-5)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-4)
    assert first[0]["tokens"] == first[1]["tokens"] == 8 * 16


def test_three_stages_follow_each_other_and_continue_the_adapter(configured, run):
    lora = {"r": 4, "target_modules": ["q_proj", "up_proj", "down_proj"]}
    config = configured(tune="lora", lora=lora, student_layers=2)
    results = [train_stage(config, number, quiet=True) for number in (1, 2, 3)]
    assert [result.stage for result in results] == [1, 2, 3]
    assert json.loads((run / "student" / "config.json").read_text())["num_hidden_layers"] == 2
    for number, temperature in ((2, "4.0"), (3, "2.0")):
        before = checkpoint.read_state(run / f"stage{number - 1}" / "best").evaluation.overall.kl
        after = logged(run, "eval", number)[0]["domains"]
        assert set(after) == ({"general", "medical"} if number == 2 else {"medical"})
        if number == 2:
            assert after["general"]["kl"]["1.0"] == pytest.approx(before[1.0])
        assert temperature in {str(key) for key in before}
    shares = logged(run, "train", 2)[-1]["shares"]
    assert abs(shares["medical"]["realised"] - shares["medical"]["scheduled"]) < 0.01
    state = checkpoint.read_state(run / "stage3" / "best")
    assert state.base == "run:student"
    assert set(state.files) >= {"model/adapter_model.safetensors", "model/adapter_config.json"}
    assert "feature.safetensors" in checkpoint.read_state(run / "stage2" / "best").files


@pytest.mark.parametrize(("first", "second"), [("lora", "full"), ("full", "lora")])
def test_a_stage_may_tune_otherwise_than_the_one_before(configured, run, tmp_path, first, second):
    train_stage(configured(tune=first), 1, quiet=True)
    start = run / "stage1" / "best"
    config = configured(tune=second, out=str(tmp_path / "other"), stage={"max_steps": 2})
    train_stage(config, 1, start=start, quiet=True)
    before = checkpoint.read_state(start).evaluation.overall
    after = logged(tmp_path / "other", "eval")[0]["overall"]
    assert after["ce"] == pytest.approx(before.ce, rel=1e-4)


def test_a_later_stage_needs_the_one_before(configured, run):
    with pytest.raises(DataError, match=r"Run --stage 1 first, or .* --from"):
        train_stage(configured(), 2)
    train_stage(configured(), 1, quiet=True)
    (run / "stage1" / "checkpoints" / "step-8").rename(run / "elsewhere")
    half = run / "stage1" / "checkpoints" / "step-4"
    checkpoint.publish(half, run / "stage1" / "last", checkpoint.read_checkpoint(half))
    with pytest.raises(DataError, match="not finished: it stands at step 4"):
        train_stage(configured(), 2)
    assert train_stage(configured(), 2, start=run / "stage1" / "best", quiet=True).stage == 2


def test_a_finished_stage_is_recognised_and_read_back(configured, run):
    result = train_stage(configured(), 1, quiet=True)
    metrics = (run / "stage1" / "metrics.jsonl").read_bytes()
    (run / "stage1" / "checkpoints" / ".step-9.new").mkdir()  # of a process that was killed
    again = train_stage(configured(head_chunk=8), 1, quiet=True)
    assert again.already_finished
    assert not result.already_finished
    assert {**again.as_dict(), "already_finished": False} == result.as_dict()
    assert (run / "stage1" / "metrics.jsonl").read_bytes() == metrics
    assert not list((run / "stage1").rglob(".*"))
    json.dumps(result.as_dict())


def test_another_configuration_in_the_same_folder_is_refused(configured):
    train_stage(configured(), 1, quiet=True)
    with pytest.raises(UsageError, match="seed is 42 there and 1 now") as caught:
        train_stage(configured(seed=1), 1, quiet=True)
    assert "--out" in str(caught.value)


def test_a_signal_saves_and_the_same_command_goes_on(configured, run, tmp_path, monkeypatch):
    whole = configured(out=str(tmp_path / "whole"))
    train_stage(whole, 1, quiet=True)
    stop_at(monkeypatch, step=3)
    with pytest.raises(RetryError, match="stopped by SIGTERM at step 3 of 8"):
        train_stage(configured(), 1, quiet=True)
    monkeypatch.undo()
    assert checkpoint.read_state(run / "stage1" / "last").step == 3
    train_stage(configured(), 1, quiet=True)
    assert without_times(run) == without_times(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_and_said(configured, run):
    train_stage(configured(), 1, quiet=True)
    before = without_times(run)
    path = run / "stage1" / "checkpoints" / "step-8" / "trainer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # last/ holds a hard link of it
    path.write_bytes(content)
    result = train_stage(configured(), 1, quiet=True)
    assert "step-8" in result.notes[0]
    assert without_times(run) == before


def test_a_full_disk_is_said_whichever_file_of_a_checkpoint_it_strikes(configured, run, monkeypatch):
    """Each is written by another library, with errors of its own."""
    config = configured(tune="lora", lora={"r": 1, "target_modules": ["q_proj"]}, stage={"max_steps": 1})
    train_stage(config, 1, quiet=True)
    files = checkpoint.read_state(run / "stage1" / "last").files
    names = ["model/adapter_model.safetensors", "model/tokenizer.json", "trainer.safetensors"]
    assert names == sorted(names, key=lambda name: files[name].num_bytes)  # so that none strikes before
    save = Learner.save
    for number, name in enumerate(names):

        def save_without_room(self, *arguments, room=files[name].num_bytes - 1):
            with room_for(room):
                save(self, *arguments)

        monkeypatch.setattr(Learner, "save", save_without_room)
        with pytest.raises(StorageError, match=r"cannot write the checkpoint .*run the same command again"):
            train_stage(config.model_copy(update={"out": str(run / str(number))}), 1, quiet=True)


def test_a_damaged_best_is_made_again_with_the_step_that_it_came_from(tmp_path):
    """Its bytes are those of the step's checkpoint, by hard links: what damages one damages both."""

    def saved(step, best, content=b"weights"):
        folder = checkpoint.step_folder(tmp_path, step)
        state = State(stage=1, step=step, position=step, finished=False, settings={}, best=Best(step=best, objective=1))
        complete = checkpoint.write_checkpoint(folder, state, lambda aside: (aside / "model").write_bytes(content))
        checkpoint.bring_up(tmp_path, folder, complete)
        return folder

    saved(4, best=4)
    saved(8, best=4)
    (saved(12, best=12) / "model").write_bytes(b"damaged")
    saved(12, best=12)  # taken again from step 8
    assert checkpoint.read_checkpoint(tmp_path / "best").step == 12


def test_an_evaluation_that_is_not_finite_stops_the_run(configured, world, tmp_path):
    """Else it would choose no best checkpoint, weigh no group, and leave a state that cannot be read back."""
    reader = CacheReader.open(world.cache)
    train, held_out = (
        {
            int(i)
            for commit in reader.units("general")
            for row in reader.sequences(commit, split)
            for i in row.prompt.input_ids[:-1]
        }
        for split in ("train", "eval")
    )
    model = save_model(tmp_path / "student", seed=1, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[max(held_out - train)] = torch.inf
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(DataError, match="the held-out loss of general is not finite at step 0 of stage 1"):
        train_stage(configured(student=str(tmp_path / "student")), 1, quiet=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_low_precision_trains_as_float32_does(configured, run, tmp_path, precision, tune):
    # With contrast a step in float16 overflows and is rightly left out, so the curves part for a while.
    contrastive = 0.1 if precision == "bf16" else 0.0
    stage = {"temperature": 2.0, "weights": {"kl": 0.7, "ce": 0.3, "feature": 0.2, "contrastive": contrastive}}
    train_stage(configured(tune=tune, stage=stage, out=str(tmp_path / "fp32")), 1, quiet=True)
    train_stage(configured(tune=tune, stage=stage, precision=precision), 1, quiet=True)
    for low, high in zip(logged(run, "train"), logged(tmp_path / "fp32", "train"), strict=True):
        assert low["losses"]["total"] == pytest.approx(high["losses"]["total"], rel=0.03)
    assert logged(run, "eval")[-1]["objective"] < logged(run, "eval")[0]["objective"]
    assert (checkpoint.read_state(run / "stage1" / "last").scaler is not None) == (precision == "fp16")


def test_gradient_checkpointing_changes_nothing_but_memory(configured, run, tmp_path):
    train_stage(configured(out=str(tmp_path / "plain")), 1, quiet=True)
    train_stage(configured(gradient_checkpointing=True), 1, quiet=True)
    for ours, plain in zip(logged(run, "train"), logged(tmp_path / "plain", "train"), strict=True):
        assert ours["losses"]["total"] == pytest.approx(plain["losses"]["total"], rel=1e-4)


def test_rows_without_a_trained_token_take_their_turn_and_teach_nothing(configured, run, changed_cache):
    """max_length cuts the answers of a domain away: steps pass, no weight changes, nothing divides by zero."""

    def late(prompt):
        return replace(prompt, loss_mask=np.arange(LENGTH - 1) >= (12 if prompt.domain == "medical" else 3))

    cache = str(changed_cache(late))
    stage = {"max_steps": 4, "eval_every": 4, "batch_size": 1, "shares": {"general": 1, "medical": 1}}
    result = train_stage(configured(max_length=6, stage=stage, cache=cache), 1, quiet=True)
    assert sorted(line["tokens"] for line in logged(run, "train")) == [0, 0, 2, 2]
    assert "2 of 4 sequences taught nothing: no trained token of theirs is within max_length 6" in " ".join(
        result.notes
    )


def test_a_stage_that_can_learn_nothing_is_refused(configured, run, monkeypatch):
    with pytest.raises(DataError, match=r"none of the 16 sequences up to step 2 .* within max_length 6"):
        train_stage(configured(max_length=6, stage={"max_steps": 2}), 1, quiet=True)
    assert not (run / "stage1" / "last").exists()
    monkeypatch.setattr(trainer, "_ENOUGH", 24)
    with pytest.raises(DataError, match=r"none of the 32 sequences up to step 4"):
        train_stage(configured(max_length=6, stage={"max_steps": 8, "eval_every": 2}), 1, quiet=True)


def test_a_loss_that_is_not_finite_stops_the_run(configured):
    with pytest.raises(DataError, match=r"learning_rate"):
        train_stage(configured(stage={"learning_rate": 1e30}), 1, quiet=True)


def test_wandb_works_offline(configured, run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train_stage(configured(wandb=True, stage={"max_steps": 2}), 1, quiet=True)
    assert list((run / "stage1" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_start_with_another_number_of_layers_is_refused(configured, world):
    with pytest.raises(UsageError, match=r"student_layers is 2, but the model to begin from, .* has 4 layers"):
        train_stage(configured(student_layers=2), 1, start=world.student, quiet=True)
