"""``distill eval``."""

from typing import Annotated, Any

import typer

from distill.commands.options import Config, Json, Set, configuration, print_json


def command(
    *,
    cache: Annotated[str | None, typer.Option(help="Folder of the cache.")] = None,
    student: Annotated[str | None, typer.Option(help="Checkpoint (RUN/stage1/best), model folder or hub name.")] = None,
    group_by: Annotated[str | None, typer.Option(help="Also by the values of this metadata key.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    allow_incomplete: Annotated[bool | None, typer.Option("--allow-incomplete", help="Use an unsealed cache.")] = None,
    config: Config = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Measure a student against the cached teacher on the held-out rows; the teacher is not needed.

    Example: distill eval --cache cache --student run/stage3/best --group-by department
    """
    from dataclasses import asdict

    from distill.config import TrainConfig
    from distill.student.evaluate import evaluate_model

    values = {
        "cache": cache,
        "student": student,
        "out": ".",  # a configuration of training has one; nothing is written
        "precision": precision,
        "allow_incomplete": allow_incomplete,
    }
    resolved = configuration(TrainConfig, "train", config, values, settings)
    evaluation = asdict(evaluate_model(resolved, group_by=group_by))
    if as_json:
        print_json({"student": resolved.student, "cache": resolved.cache, "group_by": group_by, **evaluation})
    else:
        _render(resolved.student, evaluation, group_by)


def _render(student: str, evaluation: dict[str, Any], group_by: str | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    temperatures = list(evaluation["overall"]["kl"])
    title = f"{student} against the teacher, held out ({evaluation['tail']} tail)"
    table = Table(title=Text(title), title_justify="left")
    names = [f"KL T={temperature:g}" for temperature in temperatures]
    for name in ("", *names, "CE", "perplexity", "top-1", "top-5", "calibr.", "tokens"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    rows = [*evaluation["domains"].items()]
    rows += [(f"{group_by}: {group}", figures) for group, figures in evaluation["groups"].items()]
    for name, figures in [*rows, ("all", evaluation["overall"])]:
        cells = [f"{figures['kl'][temperature]:.4f}" for temperature in temperatures]
        cells += [f"{figures['ce']:.4f}", f"{figures['perplexity']:.4g}"]
        cells += [f"{figures[key]:.1%}" for key in ("top1_agreement", "top5_agreement", "ece")]
        label = "".join(character if character.isprintable() else "�" for character in name)
        table.add_row(Text(label), *cells, f"{figures['num_tokens']:,}")
    Console(highlight=False).print(table)
