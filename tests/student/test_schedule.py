"""Protects schedules: temperatures and weights change when they should, are logged, resumed, and refused beforehand."""

import math

import pytest

from distill.config import StageConfig, TrainConfig, validated
from distill.errors import IdentityError, RetryError, UsageError
from distill.student.schedule import temperature_at, weights_at
from distill.student.trainer import train_stage
from tests.student.conftest import logged, stop_at

TRAIN = {"cache": "c", "student": "s", "out": "o"}


def stage(**changes) -> StageConfig:
    return validated(TrainConfig, {**TRAIN, "stages": {1: changes}}, origin="here").stage(1)


def test_a_list_of_temperatures_has_equal_parts_and_breakpoints_move_them():
    equal = stage(temperature=[4, 2, 1])
    assert [temperature_at(equal, step / 6) for step in range(6)] == [4, 4, 2, 2, 1, 1]
    given = stage(temperature={"values": [4, 2, 1], "at": [0.5, 0.8]})
    assert [temperature_at(given, p) for p in (0.0, 0.49, 0.5, 0.79, 0.8)] == [4, 4, 2, 2, 1]
    assert given.temperature == 1  # what the best checkpoint is chosen at
    assert stage(temperature_steps={"values": [4, 2, 1], "at": [0.5, 0.8]}) == given
    assert temperature_at(stage(temperature=2.0), 0.9) == 2


def test_weights_follow_their_schedules_and_their_means_choose_the_best():
    config = stage(weights={"kl": {"schedule": "cosine", "start": 0.9, "end": 0.1}, "ce": 0.5})
    assert [weights_at(config, p).kl for p in (0.0, 0.25, 0.5)] == pytest.approx(
        [0.9, 0.9 - 0.8 * (1 - math.cos(math.pi / 4)) / 2, 0.5]
    )
    assert weights_at(config, 0.25).ce == 0.5
    assert config.weights.kl == pytest.approx(0.5)
    step = stage(weights={"kl": {"schedule": "step", "start": 1.0, "end": 0.2, "at": 0.75}})
    assert step.weights.kl == pytest.approx(0.8)
    assert (weights_at(step, 0.74).kl, weights_at(step, 0.75).kl) == pytest.approx((1.0, 0.2))


def test_a_resolved_stage_is_read_back_as_it_is():
    config = stage(temperature=[4, 2], weights={"kl": {"schedule": "linear", "start": 1, "end": 0.5}})
    assert StageConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": {"schedule": "linear", "start": 4, "end": 1}}, r"moves in steps. Write \[4, 2, 1\]"),
        ({"temperature": {"values": [4, 2], "at": [0.2, 0.5]}}, "must rise and have 1 numbers"),
        ({"temperature": []}, "temperature_steps.values"),
        ({"temperature": [4, -1]}, "temperature_steps.values.1"),
        ({"weights": {"kl": {"schedule": "linear", "begin": 4}}}, "weight_schedules.kl.begin"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(changes, says):
    with pytest.raises(UsageError, match=says):
        stage(**changes)


def test_temperatures_that_the_cache_lacks_are_refused_before_a_model_loads(configured, tmp_path):
    config = configured(stage={"temperature": [4, 3]}, student=str(tmp_path / "no-such-student"))
    with pytest.raises(IdentityError, match="temperatures 4, 2, 1, not 3"):
        train_stage(config, 1)


def test_a_time_without_any_weight_is_refused(configured, tmp_path):
    weights = {"kl": {"schedule": "step", "start": 1, "end": 0}, "ce": 0}
    with pytest.raises(UsageError, match="all 0 at 50%"):
        train_stage(configured(stage={"weights": weights}, student=str(tmp_path / "no-such-student")), 1)


def test_a_scheduled_run_logs_what_it_used_and_goes_on_with_it(configured, tmp_path, monkeypatch):
    changes = {
        "temperature": {"values": [4, 2, 1], "at": [0.25, 0.75]},
        "weights": {"kl": {"schedule": "linear", "start": 1.0, "end": 0.2}, "ce": {"start": 0.0, "end": 0.8}},
    }
    changes["weights"]["ce"]["schedule"] = "step"
    train_stage(configured(stage=changes, out=str(tmp_path / "whole")), 1, quiet=True)
    whole = logged(tmp_path / "whole", "train")
    assert [line["temperature"] for line in whole] == [4, 4, 2, 2, 2, 2, 1, 1]
    assert [line["weights"]["kl"] for line in whole] == pytest.approx([1 - 0.1 * step for step in range(8)])
    assert ["ce" in line["losses"] for line in whole] == [False] * 4 + [True] * 4
    first = whole[0]["losses"]
    assert first["total"] == pytest.approx(first["kl"])
    stop_at(monkeypatch, step=3)
    with pytest.raises(RetryError):
        train_stage(configured(stage=changes), 1, quiet=True)
    monkeypatch.undo()
    train_stage(configured(stage=changes), 1, quiet=True)
    runs = (tmp_path / "run", tmp_path / "whole")
    ours, theirs = ([(line["losses"], line["weights"]) for line in logged(run, "train")] for run in runs)
    assert ours == theirs
