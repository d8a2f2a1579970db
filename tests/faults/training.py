"""A short training run flows in, killed again and again until it is done; whether it ended as an unkilled one did.

Half of the kills come at a random moment, half inside a save: at one of the syncs that it makes.
"""

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.config import TrainConfig
from distill.student.checkpoint import read_checkpoint
from tests.faults.torture import first_to_end, in_child

_KILLS_PER_RUN = 4
_LONGEST_S = 300.0  # of a run that nobody kills any more


def torture_training(folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Runs of eight steps, a checkpoint every second one, until ``kills`` of them were killed."""
    import torch

    from distill.student.trainer import train_stage

    torch.set_num_threads(1)
    folder.mkdir()
    values = _world(folder)
    rng = random.Random(seed)

    def train(run: Path) -> None:
        train_stage(TrainConfig.model_validate({**values, "out": str(run)}), 1, quiet=True)

    began = time.monotonic()
    assert os.waitpid(in_child(lambda: train(folder / "whole")), 0)[1] == 0
    lasts, truth = time.monotonic() - began, _result(folder / "whole")
    figures = {"kills": 0, "in_a_save": 0, "runs": 0, "failed": 0, "different": 0}
    while figures["kills"] < kills:
        run = folder / f"run-{figures['runs']}"
        figures["runs"] += 1
        left = min(_KILLS_PER_RUN, kills - figures["kills"])
        status = -1
        while status:
            saving = left > 0 and rng.random() < 0.5
            fatal = rng.randint(1, 20) if saving else 0
            child = in_child(lambda run=run, fatal=fatal: _armed(lambda: train(run), fatal))
            within = rng.uniform(0, lasts) if left > 0 and not saving else _LONGEST_S
            ended = first_to_end({child}, within=within)
            if ended is None:
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1] if ended is None else ended[1]
            if not os.WIFSIGNALED(status):
                figures["failed"] += status != 0
                break
            left -= 1
            figures["kills"] += 1
            figures["in_a_save"] += saving
        figures["different"] += _result(run) != truth
    return {**figures, "survived": not (figures["failed"] or figures["different"])}


def _armed(work: Callable[[], None], fatal: int) -> None:
    """Do ``work``; this process kills itself at its ``fatal``-th sync, unless that is 0."""
    sync, count = os.fsync, 0

    def counting(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = counting  # type: ignore[assignment]
    work()


def _world(folder: Path) -> dict[str, Any]:
    """A tiny cache and student; the configuration of a run."""
    from tests.student.conftest import build_cache, save_model

    teacher = save_model(folder / "teacher", seed=0, common=1.0, initializer_range=0.4, tie_word_embeddings=False)
    save_model(folder / "student", seed=1)
    return {
        "cache": str(build_cache(folder / "cache", teacher)),
        "student": str(folder / "student"),
        "tune": "full",
        "device": "cpu",
        "head_chunk": 32,
        "stages": {1: {"max_steps": 8, "batch_size": 4, "eval_every": 2, "eval_rows": 8, "learning_rate": 3e-3}},
    }


def _result(run: Path) -> Any:
    """Losses step by step and the hashes of the weights, the newest and the best."""
    lines = [json.loads(line) for line in (run / "stage1" / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "tokens_per_second", "waiting")
    losses = [{key: value for key, value in line.items() if key not in timed} for line in lines]
    files = [read_checkpoint(run / "stage1" / name).files for name in ("last", "best")]
    weights = [
        {name: record.sha256 for name, record in each.items() if name.endswith(".safetensors")} for each in files
    ]
    return hashlib.sha256(json.dumps([losses, weights], sort_keys=True).encode()).hexdigest()
