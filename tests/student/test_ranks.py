"""Protects training on several devices: the same losses as one process has, resuming on another number, no hangs.

Ranks are forked copies of this process, which has all libraries loaded, that talk through gloo on the CPU.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.errors import DistillError, StorageError
from distill.student import checkpoint
from distill.student.learner import Learner
from distill.student.trainer import train_stage
from tests.student.conftest import logged

STAGE = {
    "temperature": [4.0, 2.0],
    "weights": {"kl": {"schedule": "linear", "start": 0.9, "end": 0.5}, "ce": 0.3, "feature": 0.2, "contrastive": 0.1},
    "balance": "both",
    "balance_every": 3,
    "sampling": "evaluation",
    "shares": {"general": {"schedule": "linear", "start": 0.7, "end": 0.3}, "medical": 0.5},
    "eval_every": 3,
    "max_steps": 9,
    "learning_rate": 1e-3,
}
EVERY_LOSS = {"kl": 0.5, "ce": 0.2, "feature": 0.5, "attention": 0.5, "contrastive": 0.1}
ATTENTION_ALONE = {"kl": 0, "ce": 0, "attention": 0.5}  # no gradient enters where a layer's forward pass ends
LORA = {"tune": "lora", "lora": {"r": 4, "dropout": 0.0, "target_modules": ["q_proj", "up_proj", "down_proj"]}}
SHOWN = {"samples": 1, "sample_tokens": 8}
WAYS = [("ddp", "full", True), ("ddp", "lora", False), ("fsdp", "full", False), ("fsdp", "lora", True)]
LIMIT_S = 240.0  # of a hang; a busy machine is slow


def forked(world: int, action: Callable[[int], None]) -> list[int]:
    """Run ``action(rank)`` in ``world`` processes; their exit codes, negative for signals."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                torch.set_num_threads(1)
                action(rank)
                code = 0
            except DistillError as error:
                print(f"rank {rank}: {error}", flush=True)
                code = error.exit_code
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = []
    for child in children:
        ended = os.pidfd_open(child)
        if not select.select([ended], [], [], LIMIT_S)[0]:
            for other in children[len(codes) :]:
                os.kill(other, signal.SIGKILL)
            raise AssertionError("the processes hang")
        os.close(ended)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


def expectations(run: Path) -> list[list[float]]:
    """The student's likeliest probabilities at each shown token of the last evaluation."""
    record = json.loads((run / "stage1" / "tokens.json").read_bytes())
    assert record["step"] == STAGE["max_steps"]
    tokens = [token for sequence in record["sequences"] for token in sequence["tokens"]]
    return [[value for *_, value in token["student"]["choices"]] for token in tokens]


def assert_equal(ours, theirs, rel=1e-6):
    """The same numbers, but for the clock, within ``rel``."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key in theirs:
            if key not in ("time", "tokens_per_second", "waiting"):
                assert_equal(ours[key], theirs[key], rel)
    elif isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other, rel)
    elif isinstance(theirs, float):
        assert ours == (pytest.approx(theirs, rel=rel, abs=1e-9) if rel else theirs)
    else:
        assert ours == theirs


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process, made on demand."""
    made = {}

    def get(config, key):
        if key not in made:
            torch.set_num_threads(1)
            run = tmp_path_factory.mktemp("alone") / "run"
            train_stage(config.model_copy(update={"out": str(run)}), 1, quiet=True)
            made[key] = run
        return made[key]

    return get


@pytest.mark.parametrize(("parallel", "tune", "recomputed"), WAYS)
def test_two_ranks_train_as_one_process_does(configured, uneven_cache, tmp_path, alone, parallel, tune, recomputed):
    """On rows with more and fewer trained tokens, so that a mean of means over ranks is not one over tokens."""
    lora = LORA if tune == "lora" else {}
    config = configured(cache=str(uneven_cache), stage=STAGE, parallel=parallel, **SHOWN, **lora)
    whole = alone(config, tune)
    config = config.model_copy(update={"gradient_checkpointing": recomputed})
    assert forked(2, lambda _: train_stage(config, 1, quiet=True)) == [0, 0]
    run = tmp_path / "run"
    assert_equal(expectations(run), expectations(whole), rel=2e-3)  # of numbers with four digits
    for kind in ("train", "eval", "sampling"):
        for ours, theirs in zip(logged(run, kind), logged(whole, kind), strict=True):
            assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("weights", "balance", "parallel", "recomputed"),
    [
        (EVERY_LOSS, "loss", "ddp", True),
        (EVERY_LOSS, "loss", "fsdp", False),
        (EVERY_LOSS, "loss", "fsdp", True),
        (ATTENTION_ALONE, False, "fsdp", False),
    ],
)
def test_every_loss_is_learned_from_on_two_ranks_as_on_one(
    configured, tmp_path, inner_cache, weights, balance, parallel, recomputed
):
    stage = {"weights": weights, "balance": balance, "max_steps": 3, "eval_every": 3, "learning_rate": 1e-3}
    config = configured(cache=str(inner_cache), stage=stage, gradient_checkpointing=recomputed, parallel=parallel)
    train_stage(config.model_copy(update={"out": str(tmp_path / "alone")}), 1, quiet=True)
    assert forked(2, lambda _: train_stage(config, 1, quiet=True)) == [0, 0]
    lines = logged(tmp_path / "run", "train")
    assert set(lines[0]["losses"]) == {"total", *(name for name, weight in weights.items() if weight)}
    for kind in ("train", "eval"):
        for ours, theirs in zip(logged(tmp_path / "run", kind), logged(tmp_path / "alone", kind), strict=True):
            assert_equal(ours, theirs, rel=1e-5)  # Adam's first steps magnify rounding
    if "feature" in weights:
        maps = [load_file(tmp_path / run / "stage1/last/feature.safetensors") for run in ("run", "alone")]
        torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("parallel", "precision"), [("ddp", "fp32"), ("ddp", "fp16"), ("fsdp", "fp32")])
def test_a_rank_without_a_sequence_keeps_in_step(configured, tmp_path, parallel, precision):
    stage = {"batch_size": 1, "max_steps": 3, "eval_rows": 1}
    config = configured(stage=stage, parallel=parallel, precision=precision)
    train_stage(config.model_copy(update={"out": str(tmp_path / "alone")}), 1, quiet=True)
    assert forked(2, lambda _: train_stage(config, 1, quiet=True)) == [0, 0]
    for kind in ("train", "eval"):
        for ours, theirs in zip(logged(tmp_path / "run", kind), logged(tmp_path / "alone", kind), strict=True):
            assert_equal(ours, theirs)


def test_a_head_of_its_own_in_low_precision_is_sharded_as_well(configured, world, tmp_path):
    """The teacher's folder has an untied head; its frozen base is bf16, its adapters are float32."""
    config = configured(
        stage={"max_steps": 3, "eval_every": 3}, student=str(world.teacher), precision="bf16", **LORA, parallel="fsdp"
    )
    train_stage(config.model_copy(update={"out": str(tmp_path / "alone")}), 1, quiet=True)
    assert forked(2, lambda _: train_stage(config, 1, quiet=True)) == [0, 0]
    for ours, theirs in zip(logged(tmp_path / "run", "train"), logged(tmp_path / "alone", "train"), strict=True):
        assert ours["losses"]["ce"] == pytest.approx(theirs["losses"]["ce"], rel=0.01)


def test_what_cannot_be_sharded_is_refused_on_all_ranks(configured):
    config = configured(parallel="fsdp", precision="fp16")
    assert forked(2, lambda _: train_stage(config, 1, quiet=True)) == [2, 2]


def struck_at(config, number: int, victim: int, blow: signal.Signals = signal.SIGKILL) -> Callable[[int], None]:
    """Training, in which the rank ``victim`` gets a signal before step ``number``, counted from 0."""
    step = Learner.step

    def step_and_strike(self, examples, now):
        if now == number:
            os.kill(os.getpid(), blow)
        return step(self, examples, now)

    def action(rank: int) -> None:
        if rank == victim:
            Learner.step = step_and_strike
        train_stage(config, 1, quiet=True)

    return action


def test_a_signal_to_one_rank_stops_all_after_the_same_step(configured, tmp_path):
    config = configured(stage={"max_steps": 4})
    assert forked(2, struck_at(config, 2, victim=1, blow=signal.SIGTERM)) == [75, 75]
    assert checkpoint.read_state(tmp_path / "run" / "stage1" / "last").step == 3
    assert [line["step"] for line in logged(tmp_path / "run", "train")] == [1, 2, 3]


@pytest.mark.parametrize(("parallel", "tune"), [("ddp", "lora"), ("fsdp", "full")])
def test_a_killed_run_goes_on_with_another_number_of_ranks(configured, uneven_cache, tmp_path, alone, parallel, tune):
    """Two ranks, one process, two ranks again; each killed before it could save what it did last."""
    lora = LORA if tune == "lora" else {}
    config = configured(cache=str(uneven_cache), stage=STAGE, parallel=parallel, **SHOWN, **lora)
    whole = alone(config, tune)
    assert forked(2, struck_at(config, 4, victim=1)) == [75, -signal.SIGKILL]
    assert checkpoint.read_state(tmp_path / "run" / "stage1" / "last").step == 3
    assert forked(1, struck_at(config, 7, victim=0)) == [-signal.SIGKILL]
    assert checkpoint.read_state(tmp_path / "run" / "stage1" / "last").step == 6
    assert forked(2, lambda _: train_stage(config, 1, quiet=True)) == [0, 0]
    for kind in ("train", "eval", "sampling"):
        for ours, theirs in zip(logged(tmp_path / "run", kind), logged(whole, kind), strict=True):
            assert_equal(ours, theirs)
    checkpoint.read_checkpoint(tmp_path / "run" / "stage1" / "best")


@pytest.mark.parametrize(("parallel", "tune"), [("ddp", "full"), ("fsdp", "lora")])
def test_on_the_same_ranks_a_killed_run_resumes_bitwise(configured, tmp_path, parallel, tune):
    lora = {**LORA, "lora": {**LORA["lora"], "dropout": 0.1}}
    config = configured(stage=STAGE, parallel=parallel, **(lora if tune == "lora" else {}))
    whole = config.model_copy(update={"out": str(tmp_path / "whole")})
    assert forked(2, lambda _: train_stage(whole, 1, quiet=True)) == [0, 0]
    assert forked(2, struck_at(config, 5, victim=0))[0] == -signal.SIGKILL
    assert forked(2, lambda _: train_stage(config, 1, quiet=True)) == [0, 0]
    for kind in ("train", "eval", "sampling"):
        for ours, theirs in zip(logged(tmp_path / "run", kind), logged(tmp_path / "whole", kind), strict=True):
            assert_equal(ours, theirs, rel=0)
    ours, theirs = (checkpoint.read_checkpoint(tmp_path / name / "stage1" / "last") for name in ("run", "whole"))
    assert ours.files == theirs.files


def test_what_the_first_rank_cannot_write_stops_all_with_its_exit_code(configured):
    def action(rank: int) -> None:
        if rank == 0:
            checkpoint.tidy = full_disk
        train_stage(configured(stage={"max_steps": 2}), 1, quiet=True)

    def full_disk(_folder):
        raise StorageError("the disk is full")

    assert forked(2, action) == [6, 6]


def test_torchrun_starts_it_and_one_process_speaks(configured, tmp_path):
    config = configured(stage={"max_steps": 2}, samples=0)
    (tmp_path / "train.json").write_text(json.dumps({"train": config.model_dump(mode="json", exclude={"cache"})}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--stage", "1", "--cache", config.cache, "--config", str(tmp_path / "train.json"), "--json"]
    told = subprocess.run(
        [*command, "-m", "distill", "train", *options], check=False, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["stages"][0]["num_steps"] == 2
    assert [line["step"] for line in logged(tmp_path / "run", "train")] == [1, 2]
