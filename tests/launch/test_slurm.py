"""The sbatch script: byte for byte the one that was looked at, valid shell, and queued again only when it helps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distill.__main__ import app
from distill.config import CacheConfig
from distill.errors import UsageError
from distill.launch.slurm import Array, sbatch_script

GOLDEN = Path(__file__).parent / "golden" / "job.sbatch"
COMMAND = ("/opt/venv/bin/python", "-m", "distill", "cache-teacher", "--config", "/home/ada/my job.yaml")


def script(array: Array | None = None, *, folder: str = "/home/ada", **more: object) -> str:
    values: dict[str, object] = {
        "teacher": "Qwen/Qwen2.5-72B-Instruct",
        "data": {"general": ("general.jsonl",)},
        "out": "caches/qwen 72b",
        "engine": "vllm",
        "engine_options": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2},
        **more,
    }
    array = array or Array(num_workers=8, time="12:00:00", extra=("partition=gpu", "exclusive"))
    return sbatch_script(CacheConfig.model_validate(values), array, command=COMMAND, folder=Path(folder))


def test_the_script_is_the_golden_one() -> None:
    assert script() == GOLDEN.read_text()


@pytest.mark.parametrize(("code", "restarts", "again"), [(0, "0", 0), (75, "0", 1), (75, "20", 0), (6, "0", 0)])
def test_the_script_runs_as_slurm_runs_it(tmp_path: Path, code: int, restarts: str, again: int) -> None:
    """Real bash; srun and scontrol write down what they were asked for."""
    for name, status in (("srun", code), ("scontrol", 0)):
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" {name} "$@" >> {tmp_path}/log\nexit {status}\n')
        path.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": restarts,
    }
    done = subprocess.run(["bash"], input=script(), env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[: len(COMMAND) + 1] == ["srun", *COMMAND]
    assert lines[len(COMMAND) + 1 :] == ["scontrol", "requeue", "77_3"] * again


def test_gpus_follow_the_engine() -> None:
    assert "#SBATCH --gpus-per-node=8\n" in script()
    assert "#SBATCH --gpus-per-node=1\n" in script(engine_options={})
    assert "gpus" not in script(engine="transformers", engine_options={"device": "cpu"})
    with pytest.raises(UsageError, match="must be whole"):
        script(engine_options={"tensor_parallel_size": "many"})


@pytest.mark.parametrize("extra", ["--partition=gpu", "partition=a b", "partition=gpu\n#SBATCH --x", "", 'comment="x"'])
def test_wrong_sbatch_options(extra: str) -> None:
    with pytest.raises(UsageError, match="--sbatch takes"):
        Array(num_workers=1, time="1:00", extra=(extra,))


def test_wrong_numbers_and_folders() -> None:
    with pytest.raises(UsageError, match="--workers"):
        Array(num_workers=0, time="1:00")
    with pytest.raises(UsageError, match="sbatch cannot change to"):
        script(folder='/home/"ada"')
    assert '#SBATCH --chdir="/home/ada l"\n' in script(folder="/home/ada l")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text("cache: {teacher: t, data: {general: [g.jsonl]}, out: caches/a, engine: vllm}\n")
    options = ["launch", "--slurm", "--config", "job.yaml", "--workers", "2", "--set", "targets.top_k=32"]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0
    assert "#SBATCH --array=0-1\n" in done.stdout
    run = f"srun {sys.executable} -m distill cache-teacher --config {tmp_path}/job.yaml --set targets.top_k=32 "
    assert run in done.stdout
    with pytest.raises(UsageError, match="Name the scheduler"):
        CliRunner().invoke(app, ["launch", "--config", "job.yaml"], catch_exceptions=False)
    with pytest.raises(UsageError, match="top_kk"):
        CliRunner().invoke(app, [*options, "--set", "targets.top_kk=3"], catch_exceptions=False)
