"""``distill train``."""

from pathlib import Path
from typing import Annotated

import typer

from distill.commands.options import (
    Config,
    Json,
    Quiet,
    Set,
    checkpoint,
    configuration,
    one_or_many,
    print_json,
)
from distill.errors import UsageError


def command(
    *,
    stage: Annotated[str, typer.Option(help="1, 2, 3, or a range such as 1-3.")],
    cache: Annotated[list[str] | None, typer.Option(help="Folder of the cache; repeatable, for several.")] = None,
    student: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    student_layers: Annotated[int | None, typer.Option(help="Keep this many of its layers.")] = None,
    layer_choice: Annotated[
        str | None, typer.Option(help="even (default), or loss: those that it can least do without.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    start: Annotated[Path | None, typer.Option("--from", help="Checkpoint, or stage of a run, to start from.")] = None,
    tune: Annotated[str | None, typer.Option(help="lora (default) or full.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    wandb: Annotated[bool | None, typer.Option("--wandb/--no-wandb", help="Also log to wandb.")] = None,
    allow_incomplete: Annotated[bool | None, typer.Option("--allow-incomplete", help="Use an unsealed cache.")] = None,
    config: Config = None,
    settings: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the student from a cache; the teacher is not needed.

    Example: distill train --stage 1-3 --cache cache --student Qwen/Qwen2.5-7B-Instruct --out run. Running it again
    resumes, or recognises a finished stage.
    """
    from distill.config import TrainConfig
    from distill.student.ranks import leave
    from distill.student.trainer import check_stages, train_stage

    values = {
        "cache": one_or_many(cache),
        "student": student,
        "student_layers": student_layers,
        "layer_choice": layer_choice,
        "out": out,
        "tune": tune,
        "precision": precision,
        "wandb": wandb,
        "allow_incomplete": allow_incomplete,
    }
    resolved = configuration(TrainConfig, "train", config, values, settings)
    resolved = resolved.model_copy(update={"student": checkpoint(resolved.student)})
    start = None if start is None else Path(checkpoint(str(start)))
    results, numbers = [], _stages(stage)
    check_stages(resolved, numbers[1:])
    for number in numbers:
        results.append(train_stage(resolved, number, start=start, quiet=quiet))
        start = None
    if not leave():
        return
    if as_json:
        print_json({"stages": [result.as_dict() for result in results]})
        return
    from distill.report.render import render_stages

    render_stages([result.as_dict() for result in results])


def _stages(text: str) -> list[int]:
    first, _, last = text.partition("-")
    try:
        numbers = list(range(int(first), int(last or first) + 1))
    except ValueError:
        numbers = []
    if not numbers or not set(numbers) <= {1, 2, 3}:
        raise UsageError(f"--stage takes 1, 2, 3 or a range such as 1-3, got '{text}'.")
    return numbers
