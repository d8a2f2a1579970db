"""``distill doctor``."""

from typing import Annotated

import typer

from distill.commands.options import Json, print_json


def command(
    *,
    out: Annotated[str | None, typer.Option(help="Where a cache would be: its disk is looked at.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Model folder or hub name: do its weights fit?")] = None,
    as_json: Json = False,
) -> None:
    """Look at this machine before a job is paid for: packages, GPUs, memory, compiler, disk. Nothing is downloaded.

    Example: distill doctor --teacher Qwen/Qwen2.5-72B-Instruct --out caches/qwen72b
    """
    from distill.report.doctor import doctor, render_doctor

    report = doctor(out=out, teacher=teacher)
    if as_json:
        print_json(report.as_dict())
    else:
        render_doctor(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)
