"""Protects evaluation-driven sampling: shares by equation, floors, nothing starves, and a resumed run sees the same."""

from collections import Counter

import numpy as np
import pytest

from distill.cache.reader import CacheReader
from distill.config import ShareConfig
from distill.errors import DataError, RetryError, UsageError
from distill.student import checkpoint
from distill.student.checkpoint import Reweighting
from distill.student.figures import Evaluation, Figures
from distill.student.stage import plan_stage
from distill.student.stream import TrainStream
from distill.student.trainer import train_stage
from tests.student.conftest import logged, stop_at, without_times

BOTH = {"general": 0.5, "medical": 0.5}
DRIVEN = {"sampling": "evaluation", "shares": BOTH, "max_steps": 12, "eval_every": 4}
BY_DEPARTMENT = {**DRIVEN, "sampling_by": "department"}


def evaluation(**ce):
    """An evaluation whose domains have these cross-entropies."""
    figures = {
        name: Figures(
            num_sequences=1,
            num_tokens=1,
            kl={4.0: 0.0},
            ce=value,
            perplexity=1.0,
            top1_agreement=0.0,
            top5_agreement=0.0,
            ece=0.0,
            feature=None,
        )
        for name, value in ce.items()
    }
    return Evaluation(tail="bucket", domains=figures, overall=next(iter(figures.values())))


@pytest.fixture
def reader(world):
    return CacheReader.open(world.cache)


def test_weights_follow_held_out_losses_smoothly(configured, reader):
    sampler = plan_stage(configured(stage={**DRIVEN, "weights": {"kl": 0, "ce": 1}}), 1, reader).sampler
    first = sampler.next_weights(evaluation(general=1.0, medical=3.0), ())
    assert first == {"general": 0.5, "medical": 1.5}
    recorded = (Reweighting(position=0, weights=first),)
    assert sampler.next_weights(evaluation(general=2.0, medical=2.0), recorded) == {"general": 0.75, "medical": 1.25}
    assert sampler.next_weights(evaluation(general=2.0), ()) == {"general": 1.0, "medical": 1.0}
    with pytest.raises(DataError, match="no held-out row"):
        sampler.next_weights(None, ())


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
def test_shares_are_those_of_the_equation_and_keep_their_floor(configured, reader, floor):
    stage = {**DRIVEN, "sampling_floor": floor, "batch_size": 100, "max_steps": 20, "eval_every": 10}
    plan = plan_stage(configured(stage=stage), 1, reader)
    weights = {"general": 0.1, "medical": 1.9}
    plan.sampler.apply(Reweighting(position=0, weights=weights))
    wanted = floor * 0.5 + (1 - floor) * 0.5 * 0.1 / (0.5 * 2.0)
    assert np.mean(plan.assigned[:1000] == 0) == pytest.approx(wanted, abs=2e-3)
    plan.sampler.apply(Reweighting(position=1000, weights={"general": 1.0, "medical": 1.0}))
    assert np.mean(plan.assigned[1000:] == 0) == pytest.approx(0.5, abs=2e-3)


def test_by_a_metadata_key_each_domain_keeps_its_scheduled_share(configured, reader):
    shares = {"general": ShareConfig(start=0.25).model_dump(), "medical": 0.75}
    stage = {**BY_DEPARTMENT, "shares": shares, "batch_size": 100, "max_steps": 10, "eval_every": 10}
    plan = plan_stage(configured(stage=stage), 1, reader)
    assert [(cell.domain, cell.group) for cell in plan.cells] == [
        ("general", "(none)"),
        ("medical", "cardiology"),
        ("medical", "neurology"),
    ]
    assert sum(unit.num_rows for cell in plan.cells for unit in cell.units) == reader.num_rows(split="train")
    weights = {"(none)": 5.0, "cardiology": 0.0, "neurology": 2.0}
    plan.sampler.apply(Reweighting(position=0, weights=weights))
    parts = [np.mean(plan.assigned == number) for number in range(3)]
    assert parts == pytest.approx([0.25, 0.3 * 0.375, 0.75 - 0.3 * 0.375], abs=2e-3)
    assert plan.shares(10)["medical"]["realised"] == pytest.approx(0.75, abs=2e-3)


def test_a_rare_group_is_never_starved_however_often_weights_change(configured, reader):
    """What a cell is owed is carried over from one evaluation to the next."""
    stage = {**DRIVEN, "shares": {"general": 0.99, "medical": 0.01}, "batch_size": 1, "eval_every": 5}
    plan = plan_stage(configured(stage={**stage, "max_steps": 1000}), 1, reader)
    for position in range(0, 1000, 5):
        plan.sampler.apply(Reweighting(position=position, weights={"general": 1.0, "medical": 1.0}))
    assert Counter(plan.assigned.tolist())[1] == 10


def test_walks_have_the_rows_of_their_group_alone(configured, reader):
    plan = plan_stage(configured(stage=BY_DEPARTMENT), 1, reader)
    weights = {"(none)": 1.0, "cardiology": 1.0, "neurology": 1.0}
    for position in (0, 32, 64):
        plan.sampler.apply(Reweighting(position=position, weights=weights))
    department = {
        tuple(row.prompt.input_ids): row.prompt.metadata.get("department", "(none)")
        for commit in reader.commits
        for row in reader.sequences(commit, "train")
    }
    with TrainStream(reader, plan.orders, plan.assigned, max_length=24) as stream:
        examples = [example for step in stream.steps(0, 8) for example in step]
    found = [department[tuple(example.input_ids)] for example in examples]
    assert found == [plan.cells[number].group for number in plan.assigned]
    cardiology = [tuple(e.input_ids) for e, name in zip(examples, found, strict=True) if name == "cardiology"]
    assert len(set(cardiology[:20])) == 20 < len(cardiology)  # no row twice before all were seen


@pytest.mark.parametrize("stage", [DRIVEN, BY_DEPARTMENT], ids=["domain", "department"])
def test_a_stopped_run_goes_on_with_its_recorded_weights(configured, tmp_path, monkeypatch, stage):
    whole, parted = tmp_path / "whole", tmp_path / "run"
    train_stage(configured(stage=stage, out=str(whole)), 1, quiet=True)
    stop_at(monkeypatch, step=6)
    with pytest.raises(RetryError):
        train_stage(configured(stage=stage), 1, quiet=True)
    monkeypatch.undo()
    train_stage(configured(stage=stage), 1, quiet=True)
    assert without_times(parted) == without_times(whole)
    states = [checkpoint.read_state(run / "stage1" / "last") for run in (parted, whole)]
    assert states[0].sampling == states[1].sampling
    assert [record.position for record in states[0].sampling] == [0, 32, 64]
    assert [line["step"] for line in logged(whole, "sampling")] == [0, 4, 8]


def test_the_harder_group_comes_more_often(configured, tmp_path):
    """The student already knows general, so medical is drawn more than its half."""
    train_stage(
        configured(stage={"max_steps": 30, "weights": {"kl": 0, "ce": 1}}, out=str(tmp_path / "a")), 1, quiet=True
    )
    stage = {**DRIVEN, "weights": {"kl": 0, "ce": 1}, "max_steps": 4, "batch_size": 32}
    train_stage(configured(stage=stage), 1, start=tmp_path / "a" / "stage1" / "best", quiet=True)
    held_out = {name: figures["ce"] for name, figures in logged(tmp_path / "run", "eval")[0]["domains"].items()}
    weights = logged(tmp_path / "run", "sampling")[0]["weights"]
    realised = logged(tmp_path / "run", "train")[-1]["shares"]
    assert (weights["medical"] > weights["general"]) == (held_out["medical"] > held_out["general"])
    assert (realised["medical"]["realised"] > 0.5) == (weights["medical"] > 1)
    assert weights["medical"] != weights["general"]


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"sampling": "evaluation"}, "tells 1 apart .general."),
        ({**DRIVEN, "sampling_by": "ward"}, "tells 1 apart .*none"),
    ],
)
def test_fewer_than_two_groups_are_refused(configured, reader, stage, says):
    with pytest.raises(UsageError, match=says):
        plan_stage(configured(stage=stage), 1, reader)
