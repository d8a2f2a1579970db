"""``distill diff``."""

from pathlib import Path
from typing import Annotated

import typer

from distill.commands.options import Json, print_json


def command(
    one: Annotated[Path, typer.Argument(metavar="A", help="Folder of a cache.")],
    two: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.")],
    *,
    as_json: Json = False,
) -> None:
    """Show every field in which two caches differ; exit code 4 if they are of different teachers or targets.

    Example: distill diff cache-a cache-b
    """
    from distill.errors import IdentityError
    from distill.report.diff import diff, render_diff

    report = diff(one, two)
    if as_json:
        print_json(report.as_dict())
    else:
        render_diff(report)
    if not report.same_identity:
        raise typer.Exit(IdentityError.exit_code)
