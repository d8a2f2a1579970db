"""A verified cache's problems flow in, a repair that asks for the broken units again flows out.

Nothing is changed or deleted here: see ``distill.cache.generations`` for what a repair is.
"""

from distill.cache import generations, storage
from distill.errors import CorruptionError, RetryError
from distill.report.verify import VerifyReport


def repair(report: VerifyReport) -> tuple[str, ...]:
    """Ask for the units that ``report`` found broken, and the manifest, to be made again; returns the units.

    From now on they do not exist for any reader; the next ``distill cache-teacher`` run of the same command makes them
    and seals the cache. Where the manifest alone is broken no unit is asked for, and nothing happens where nothing is
    wrong. Raises CorruptionError where something else is wrong, which only a copy can restore; RetryError when somebody
    else repaired the cache since it was verified.
    """
    if report.ok:
        return ()
    manifest_name = generations.Generations(number=report.generation, units={}).manifest_name
    beyond = [item for item in report.problems if item.unit is None and item.file != manifest_name]
    if beyond:
        files = ", ".join(dict.fromkeys(item.file for item in beyond))
        raise CorruptionError(
            f"{report.path} is not repaired: units and the manifest can be made again, but something is wrong with "
            f"{files} too. Restore that from a copy (or delete it if it is in teacher/: the same `distill "
            "cache-teacher` command writes it again), then run `distill verify --repair` again."
        )
    units: dict[str, str] = {}
    for item in report.problems:
        if item.unit is not None:
            units.setdefault(item.unit, f"{item.file}: {item.text}")
    if not generations.request(storage.root_of(report.path), after=report.generation, units=units):
        raise RetryError(
            f"{report.path} was repaired by somebody else while it was verified. Run `distill verify` again to see "
            "what is still wrong."
        )
    return tuple(units)
