"""Protects tracking without a network: what training measures and says is read back from each tracker's files."""

import json
import sys
import time

import pytest
import yaml

from distill.errors import UsageError
from distill.student.metrics import Metrics
from distill.student.samples import Answer
from distill.student.trainer import train_stage

ANSWER = Answer(
    domain="medical",
    prompt_id="p",
    prompt="why",
    student="because",
    reference="so",
    author="teacher",
    num_tokens=1,
    num_same=0,
)


@pytest.fixture
def stage_dir(tmp_path):
    """A stage's folder with its config.yaml."""
    folder = tmp_path / "run" / "stage1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"distill": "1", "train": {"seed": 42}}))
    return folder


def events_of(folder):
    """All that TensorBoard itself finds in the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return events


def text(events, tag):
    """The texts of a tag, as (step, text)."""
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]


def test_tensorboard_holds_what_metrics_jsonl_holds(configured, tmp_path):
    train_stage(configured(tensorboard=True, samples=1, sample_tokens=3), 1, quiet=True)
    folder = tmp_path / "run" / "stage1"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    said = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    events = events_of(folder / "tensorboard")
    found = {event.step: event.value for event in events.Scalars("train/losses/total")}
    assert found == pytest.approx({line["step"]: line["losses"]["total"] for line in lines if line["kind"] == "train"})
    found = {event.step: event.value for event in events.Scalars("eval/domains/general/kl/4.0")}
    expected = {line["step"]: line["domains"]["general"]["kl"]["4.0"] for line in lines if line["kind"] == "eval"}
    assert found == pytest.approx(expected)
    texts = text(events, "samples/general/1/text_summary")
    assert [step for step, _ in texts] == [0, 4, 8]
    assert f"**student**: {said[-1]['student']}" in texts[-1][1]
    ((_, about),) = text(events, "config/text_summary")
    assert all(part in about for part in ("cache_identity:", "versions:", "learning_rate: 0.003"))


def test_a_resumed_tensorboard_hides_what_a_killed_process_left(configured, stage_dir):
    config = configured(tensorboard=True)
    for begins_after, value in ((0, 1.0), (2, 2.0)):
        with Metrics(stage_dir, step=begins_after, config=config, number=1) as metrics:
            for step in range(begins_after + 1, 5):
                metrics.log("train", step, {"loss": value})
    found = [(event.step, event.value) for event in events_of(stage_dir / "tensorboard").Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_wandb_works_offline_and_goes_on_with_its_run(configured, stage_dir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = configured(wandb=True, samples=1)
    for step in (0, 3):
        with Metrics(stage_dir, step=step, config=config, number=1) as metrics:
            metrics.log("train", step + 1, {"loss": 1.5, "weights": {"kl": 0.5}})
            metrics.log_answers(step + 1, [ANSWER])
    runs = written(stage_dir / "wandb")
    assert {run["id"] for run in runs} == {(stage_dir / "wandb.id").read_text().strip()}
    for run in runs:
        assert json.loads(run["config"]["train"]) == {"seed": 42}
        assert run["history"]["train/loss"] == "1.5"
        assert run["history"]["train/weights/kl"] == "0.5"
        assert run["history"]["samples/ncols"] == "8"
    table = next(stage_dir.glob("wandb/*/files/media/table/*.json"))
    assert json.loads(table.read_text())["data"] == [["medical", "p", "why", "because", "so", "teacher", 1, 0]]


def written(folder):
    """What all runs below a folder hold; wandb's own process may still be at work after a run has ended."""
    deadline = time.monotonic() + 60
    while True:
        runs = [records_of(path) for path in folder.glob("offline-run-*/*.wandb")]
        if all("id" in run and run["history"] for run in runs) or time.monotonic() > deadline:
            return runs
        time.sleep(0.2)


def records_of(path):
    """Id, configuration and history in a run's file: LevelDB's log format after a head of seven bytes."""
    from wandb.proto import wandb_internal_pb2 as records

    data, position, whole = path.read_bytes(), 7, b""
    found = {"config": {}, "history": {}}
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block that has no room for a head
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in (1, 4):  # whole, last part
            continue
        record = records.Record.FromString(whole)
        whole = b""
        if record.HasField("run"):
            found["id"] = record.run.run_id
            found["config"] |= {item.key: item.value_json for item in record.run.config.update}
        for item in record.history.item:
            found["history"][item.key or "/".join(item.nested_key)] = item.value_json
    return found


@pytest.mark.parametrize(("module", "flag"), [("wandb", "wandb"), ("torch.utils.tensorboard", "tensorboard")])
def test_a_tracker_that_is_not_installed(configured, stage_dir, monkeypatch, module, flag):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"Install distill\[{flag}\]"):
        Metrics(stage_dir, step=0, config=configured(**{flag: True}), number=1)
    assert not (stage_dir / "metrics.jsonl").exists()
