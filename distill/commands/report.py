"""``distill report``."""

from pathlib import Path
from typing import Annotated

import typer

from distill.commands.options import Json, print_json


def command(
    source: Annotated[Path, typer.Argument(metavar="CACHE|RUN", help="Folder of a cache, of a run or of one stage.")],
    *,
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write charts, tables and single tokens into one HTML file that needs no network, and the charts as PNG files.

    Example: distill report cache --out cache.html
    """
    from distill.report.html import write_report

    report = write_report(source, out)
    if as_json:
        print_json(report.as_dict())
    else:
        print(f"{report.path}: {report.num_charts} charts about the {report.about}, {report.num_bytes / 1000:,.0f} kB.")
        print(f"The same charts as PNG files: {report.pictures}")
