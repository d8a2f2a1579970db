"""A cache's configuration flows in, an sbatch script that fills it with an array of workers flows out."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.config import CacheConfig
from distill.errors import UsageError
from distill.launch.gpus import gpus_of_engine

_WARNING_S = 120  # before the time limit; a worker needs up to 30 to stop
_MOST_RESTARTS = 20  # of a task: an engine that never starts also exits with 75


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """How the workers run: ``extra`` are further sbatch options, "partition=gpu"."""

    num_workers: int
    time: str
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise UsageError(f"--workers must be at least 1, got {self.num_workers}.")
        for option in (f"time={self.time}", *self.extra):
            if not re.fullmatch(r"[a-z][a-z-]*(=[^\s\"']+)?", option):
                raise UsageError(
                    f"--sbatch takes NAME or NAME=VALUE as sbatch does, without dashes before the name, spaces or "
                    f"quotes, for example partition=gpu; got '{option}'."
                )


def sbatch_script(config: CacheConfig, array: Array, *, command: Sequence[str], folder: Path) -> str:
    """The script; ``command`` is what every worker runs in ``folder``.

    A worker gets as many GPUs as its engine spans: tensor_parallel_size times pipeline_parallel_size.
    """
    name = "distill-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.out).name)
    gpus = gpus_of_engine(config)
    options = [
        f"job-name={name}",
        f"array=0-{array.num_workers - 1}",
        "nodes=1",
        "ntasks=1",
        *([f"gpus-per-node={gpus}"] if gpus else []),
        f"time={array.time}",
        f"signal=USR1@{_WARNING_S}",
        "requeue",
        "open-mode=append",
        f"chdir={_quoted(folder)}",
        f"output={name}-%A_%a.log",
        *array.extra,
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {array.num_workers} workers fill {config.out}. Submit this with sbatch; again, if anything is left.",
            *(f"#SBATCH --{option}" for option in options),
            "",
            "code=0",
            f"srun {shlex.join(command)} || code=$?",
            "# 75: stopped by the time limit or for another job, or its engine died. Whole units are committed; go on.",
            f'if [ "$code" -eq 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {_MOST_RESTARTS} ]; then',
            '    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
            "fi",
            'exit "$code"',
            "",
        ]
    )


def _quoted(folder: Path) -> str:
    text = str(folder)
    if re.search(r"[\"\\\n]", text):
        raise UsageError(f"sbatch cannot change to {text!r}: its name has quotes, backslashes or line breaks.")
    return f'"{text}"' if re.search(r"\s", text) else text
