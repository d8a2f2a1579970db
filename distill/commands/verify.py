"""``distill verify``."""

from typing import Annotated

import typer

from distill.commands.options import CachePath, Json, print_json


def command(
    cache: CachePath,
    *,
    repair: Annotated[
        bool, typer.Option("--repair", help="Have the broken units made again by the next cache-teacher run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read a cache back whole and check hashes, counts and ranges; exit code 5 if anything is wrong.

    With --repair, exit code 0 if all that is wrong can be made again and was asked for.

    Example: distill verify cache
    """
    from distill.errors import CorruptionError
    from distill.report.render import render_verify
    from distill.report.repair import repair as ask_again
    from distill.report.verify import verify

    report = verify(cache)
    if not as_json:
        render_verify(report)
    requeued = ask_again(report) if repair else ()
    if as_json:
        print_json({**report.as_dict(), "requeued": list(requeued)})
    elif repair and not report.ok:
        what = f"{len(requeued)} units ({', '.join(requeued)})" if requeued else "the manifest"
        print(f"To be made again: {what}. Run the same `distill cache-teacher` command as before.")
    if not report.ok and not repair:
        raise typer.Exit(CorruptionError.exit_code)
