"""``distill gc``."""

from typing import Annotated

import typer

from distill.commands.options import CachePath, Json, print_json


def command(
    cache: CachePath,
    *,
    older_than: Annotated[str, typer.Option(help="Age, in h, d or w, below which a file may be a worker's.")] = "7d",
    delete: Annotated[bool, typer.Option("--delete", help="Delete them; without it they are only shown.")] = False,
    as_json: Json = False,
) -> None:
    """Find what killed writers left in a cache: files that no commit record names, half-written ones, open uploads.

    Example: distill gc cache --older-than 7d --delete
    """
    from distill.report.gc import age_of, collect, render_gc

    report = collect(cache, older_than_s=age_of(older_than), delete=delete)
    if as_json:
        print_json(report.as_dict())
    else:
        render_gc(report)
