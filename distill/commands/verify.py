"""``distill verify``."""

import typer

from distill.commands.options import CachePath, Json, print_json


def command(cache: CachePath, *, as_json: Json = False) -> None:
    """Read a cache back whole and check hashes, counts and ranges; exit code 5 if anything is wrong.

    Example: distill verify cache
    """
    from distill.errors import CorruptionError
    from distill.report.render import render_verify
    from distill.report.verify import verify

    report = verify(cache)
    if as_json:
        print_json(report.as_dict())
    else:
        render_verify(report)
    if not report.ok:
        raise typer.Exit(CorruptionError.exit_code)
