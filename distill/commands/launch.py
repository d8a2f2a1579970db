"""``distill launch``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from distill.commands.options import Json, Set, configuration, print_json
from distill.errors import UsageError


def command(
    *,
    config: Annotated[Path, typer.Option("--config", help="YAML file with the whole cache-teacher job.")],
    slurm: Annotated[bool, typer.Option("--slurm", help="For Slurm: a job array.")] = False,
    workers: Annotated[int, typer.Option(help="Tasks of the array.")] = 4,
    time: Annotated[str, typer.Option(help="Time limit of a task; it goes on in the next one.")] = "24:00:00",
    sbatch: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, a further sbatch option; repeatable.")] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Print the job script that fills one cache with many workers.

    Example: distill launch --slurm --config job.yaml --workers 8 --sbatch partition=gpu > job.sbatch
    """
    from distill.config import CacheConfig
    from distill.launch.slurm import Array, sbatch_script

    if not slurm:
        raise UsageError(
            "Name the scheduler: --slurm. For Kubernetes and SkyPilot, docs/many-machines.md has job descriptions to "
            "copy."
        )
    resolved = configuration(CacheConfig, "cache", config, {}, settings)
    run = [sys.executable, "-m", "distill", "cache-teacher", "--config", str(config.resolve())]
    for setting in settings or []:
        run += ["--set", setting]
    array = Array(num_workers=workers, time=time, extra=tuple(sbatch or []))
    script = sbatch_script(resolved, array, command=run, folder=Path.cwd())
    if as_json:
        print_json({"script": script})
    else:
        print(script, end="")
