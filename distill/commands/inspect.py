"""``distill inspect``."""

from typing import Annotated

import typer

from distill.commands.options import CachePath, Json, print_json


def command(
    cache: CachePath,
    *,
    row: Annotated[int, typer.Option(help="Which sequence to show token by token.")] = 0,
    as_json: Json = False,
) -> None:
    """Show what a cache holds: identity, counts, bytes, fidelity, and one row token by token.

    Example: distill inspect cache --row 7
    """
    from distill.report.inspect import inspect
    from distill.report.render import render_inspect

    report = inspect(cache, row=row)
    if as_json:
        print_json(report.as_dict())
    else:
        render_inspect(report)
