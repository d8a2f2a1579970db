"""Protects the plan of a stage: what is refused before a model loads, the number of steps, a run's settings."""

import shutil
import sys
from dataclasses import replace

import pytest

from distill.cache.reader import CacheReader
from distill.errors import DataError, IdentityError, UsageError
from distill.student.checkpoint import State
from distill.student.stage import plan_stage, refuse_other_settings, settings_of
from distill.student.trainer import train_stage


@pytest.fixture
def reader(world):
    return CacheReader.open(world.cache)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"weights": {"kl": 1, "attention": 0.2}}, "holds no queries and keys"),
        ({"tail": "sampled", "temperature": 1.0}, "holds no ids drawn"),
    ],
)
def test_targets_that_the_cache_lacks_are_refused_before_a_model_loads(configured, tmp_path, stage, words):
    with pytest.raises(IdentityError, match=words):
        train_stage(configured(stage=stage, student=str(tmp_path / "no-such-student")), 1)


def test_nothing_to_learn_is_refused(configured, reader):
    with pytest.raises(UsageError, match="nothing to learn"):
        plan_stage(configured(stage={"weights": {"kl": 0, "ce": 0}}), 1, reader)


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        (
            {"beta": 0.3},
            r"stages\.1\.beta is 0\.3, but its divergence is forward, which mixes nothing\. Leave beta out",
        ),
        ({"beta": 0.3, "divergence": "reverse"}, "its divergence is reverse"),
        ({"feature": {"layers": {9: 0}}}, r"stages\.1\.feature says .* stages\.1\.weights\.feature is 0\. Leave"),
        ({"attention": {"measure": "mse"}}, r"stages\.1\.attention says .* stages\.1\.weights\.attention is 0\. Leave"),
    ],
)
def test_a_key_about_a_loss_that_the_stage_does_not_have_is_refused(configured, reader, stage, says):
    with pytest.raises(UsageError, match=says):
        plan_stage(configured(stage=stage), 1, reader)


def test_a_key_about_a_loss_that_comes_later_is_taken(configured, reader):
    rising = {"kl": 1, "feature": {"schedule": "step", "start": 0, "end": 0.2}}
    for stage in (
        {"beta": 0.3, "divergence": "skew"},
        {"feature": {"layers": {9: 0}}, "weights": rising},
        {"feature": {"layers": "none"}},
    ):
        assert plan_stage(configured(stage=stage), 1, reader).num_steps == 8


def test_a_temperature_that_the_cache_lacks_is_refused_before_a_model_loads(configured, tmp_path):
    config = configured(stage={"temperature": 3.0}, student=str(tmp_path / "no-such-student"))
    with pytest.raises(IdentityError, match="temperatures 4, 2, 1, not 3"):
        train_stage(config, 1)


@pytest.mark.parametrize(
    ("stage", "fix"),
    [
        ({"temperature": 2.0, "weights": {"kl": 0, "ce": 1, "feature": 0.2}}, "Set the weight to 0"),
        ({"temperature": 2.0, "weights": {"kl": 0, "ce": 1, "contrastive": 0.2}}, r"contrastive is 0\.2"),
        ({"temperature": 2.0}, "stages.1.tail to bucket"),
    ],
)
def test_a_cache_without_hidden_states_says_what_to_change(configured, bare_cache, stage, fix):
    with pytest.raises(IdentityError, match=fix):
        train_stage(configured(cache=str(bare_cache), stage=stage), 1)


@pytest.mark.parametrize("shares", [{}, {"general": 0}, {"law": 0, "medical": {"start": 0}}])
def test_shares_that_give_nothing_are_refused(configured, reader, shares):
    says = (
        r"stages\.1\.shares gives no domain a share, .* Give one above 0 to a domain of .*, which has general, medical"
    )
    with pytest.raises(UsageError, match=says):
        plan_stage(configured(stage={"shares": shares}), 1, reader)


def test_missing_domains_and_rows_are_named(configured, reader):
    with pytest.raises(DataError, match=r"law, but .* has no law; it has general, medical"):
        plan_stage(configured(general="law"), 1, reader)
    commits = tuple(replace(commit, num_rows=replace(commit.num_rows, train=0)) for commit in reader.commits)
    empty = CacheReader(reader.root, reader, commits, sealed=True)
    with pytest.raises(DataError, match="no train rows of the domain general"):
        plan_stage(configured(), 1, empty)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"epochs": 3, "batch_size": 16}, 8),  # ceil(3 * 40 / 16)
        ({"epochs": 0.5, "batch_size": 8}, 3),
        ({"epochs": 0.01, "batch_size": 8}, 1),
        ({"epochs": 3, "max_steps": 5}, 5),
    ],
)
def test_the_number_of_steps(configured, reader, changes, steps):
    plan = plan_stage(configured(stage={"max_steps": None, **changes}), 1, reader)
    assert plan.num_steps == steps
    assert len(plan.assigned) == steps * plan.stage.batch_size


def test_an_epoch_counts_all_domains_that_ever_have_a_share(configured, reader):
    shares = {
        "general": {"schedule": "linear", "start": 1, "end": 0},
        "medical": {"schedule": "linear", "start": 0, "end": 1},
        "law": 0,
    }
    plan = plan_stage(configured(stage={"max_steps": None, "epochs": 1, "shares": shares}), 1, reader)
    assert plan.domains == ("general", "medical")
    assert plan.num_steps == 10  # (40 + 40) / 8
    for step in (1, 5, 10):
        for figures in plan.shares(step).values():
            assert abs(figures["realised"] - figures["scheduled"]) <= 1 / (step * 8)


def test_every_key_that_differs_is_named(configured, reader, tmp_path):
    config = configured()
    settings = settings_of(config, plan_stage(config, 1, reader), reader, "student")
    state = State(stage=1, step=3, position=24, finished=False, settings=settings)
    refuse_other_settings(tmp_path, state, settings)
    other = configured(seed=7, stage={"learning_rate": 0.5}, micro_batch_tokens=999, head_chunk=1)
    asked = settings_of(other, plan_stage(other, 1, reader), reader, "elsewhere")
    with pytest.raises(UsageError, match="another --out") as caught:
        refuse_other_settings(tmp_path, state, asked)
    message = str(caught.value)
    for part in ("seed is 42 there and 7 now", "stage.learning_rate is 0.003 there and 0.5 now", 'start is "student"'):
        assert part in message
    assert "head_chunk" not in message  # changes speed alone


def test_a_moved_cache_is_the_same_and_a_grown_one_is_not(configured, reader, tmp_path):
    config = configured()
    settings = settings_of(config, plan_stage(config, 1, reader), reader, "student")
    shutil.copytree(reader.root, tmp_path / "moved")
    moved = CacheReader.open(tmp_path / "moved")
    config = configured(cache=str(moved.root))
    assert settings_of(config, plan_stage(config, 1, moved), moved, "student") == settings
    fewer = CacheReader(reader.root, reader, reader.commits[1:], sealed=False)
    assert settings_of(config, plan_stage(config, 1, fewer), fewer, "student") != settings


def test_processes_that_cannot_find_each_other_are_refused(configured, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2, but RANK and .* Start them with torchrun"):
        train_stage(configured(), 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantise": "nf4", "tune": "full"}, "only adapters can train"),
        ({"quantise": "nf4", "tune": "lora"}, "quantise nf4 needs an NVIDIA GPU: device is cpu"),
        ({"optimizer": "paged_adamw_8bit"}, "optimizer paged_adamw_8bit needs an NVIDIA GPU"),
    ],
)
def test_quantised_training_is_refused_before_a_model_loads(configured, tmp_path, changes, says):
    with pytest.raises(UsageError, match=says):
        train_stage(configured(student=str(tmp_path / "no-such-student"), **changes), 1)


def test_a_missing_bitsandbytes_is_named(configured, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises ImportError
    with pytest.raises(UsageError, match=r"needs bitsandbytes, which is not installed. Install distill\[quantised\]"):
        train_stage(configured(optimizer="adamw_8bit", device="cuda"), 1)


def test_sampling_by_evaluations_needs_held_out_rows_before_a_model_loads(configured, changed_cache, tmp_path):
    cache = str(changed_cache(lambda prompt: replace(prompt, split="train")))
    stage = {"sampling": "evaluation", "shares": {"general": 1, "medical": 1}}
    config = configured(cache=cache, student=str(tmp_path / "no-such-student"), stage=stage)
    with pytest.raises(DataError, match=r"has no held-out rows of general or medical .* set sampling to uniform"):
        train_stage(config, 1)


def test_a_missing_tracker_is_named_before_a_model_loads(configured, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for tracker, says in (("wandb", r"Install distill\[wandb\]"), ("tensorboard", r"Install distill\[tensorboard\]")):
        with pytest.raises(UsageError, match=says):
            train_stage(configured(student=str(tmp_path / "no-such-student"), **{tracker: True}), 1)
