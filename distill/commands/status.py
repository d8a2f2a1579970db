"""``distill status``."""

from distill.commands.options import CachePath, Json, print_json


def command(cache: CachePath, *, as_json: Json = False) -> None:
    """Show how far a cache is: units, rows, targets, rejects, speed and time left, from its folder alone.

    Example: distill status cache
    """
    from distill.report.status import render_status, status

    report = status(cache)
    if as_json:
        print_json(report.as_dict())
    else:
        render_status(report)
