"""Repair records flow in, the names of the records that count flow out: which commit of a unit, which manifest.

    repairs/2.json (asks for units 00003 and 00007)  ->  commits/00003.2.json, commits/00007.2.json, manifest.2.json

Nothing is overwritten. A repair is one file, created once, that raises the cache's generation by one: from then on the
units that it names do not exist until somebody commits them again, and the cache is not sealed until it has a manifest
of that generation. Repairs are numbered without gaps, so nobody lists a folder to find them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distill.cache import document, storage
from distill.cache.plan import Repair
from distill.errors import CorruptionError

_FIX = "Restore it from a copy; or delete it and every later one in repairs/, and run `distill verify --repair` again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Generations:
    """The generation of a cache and of its units. Units that no repair names are of generation 1."""

    number: int
    units: Mapping[str, int]  # unit -> the last repair that names it

    def of(self, unit: str) -> int:
        """The generation of the unit's commit that counts."""
        return self.units.get(unit, 1)

    def commit_name(self, unit: str) -> str:
        """Path of that commit below the cache's folder."""
        return f"commits/{_numbered(unit, self.of(unit))}.json"

    @property
    def manifest_name(self) -> str:
        """Path of the manifest that counts."""
        return f"{_numbered('manifest', self.number)}.json"


def current(root: storage.Root) -> Generations:
    """What the repairs of the cache at ``root`` ask for. Raises CorruptionError when one of them is damaged."""
    number, units = 1, dict[str, int]()
    while (repair := _read(root, number + 1)) is not None:
        number += 1
        units |= dict.fromkeys(repair.units, number)
    return Generations(number=number, units=units)


def request(root: storage.Root, *, after: int, units: Mapping[str, str]) -> bool:
    """Ask for ``units`` (with what is wrong with each) and the manifest to be made again, in generation ``after`` + 1.

    False, and nothing changed, when somebody else asked first. Raises StorageError when the disk refuses.
    """
    repair = Repair(generation=after + 1, units=dict(units))
    return storage.create(root, _repair_name(after + 1), document.render(repair))


def shard_stem(unit: str, generation: int, nonce: str) -> str:
    """Name, without a suffix, of the files that a writer makes for a unit."""
    return f"{_numbered(unit, generation)}-{nonce}"


def generation_of(file_name: str) -> int:
    """The generation that a shard, a rejects file or a temporary file of one was made for."""
    _, _, number = file_name.lstrip(".").partition("-")[0].partition(".")
    return int(number) if number.isdecimal() else 1


def _read(root: storage.Root, number: int) -> Repair | None:
    name = _repair_name(number)
    try:
        repair = document.load(Repair, root, name, fix=_FIX)
    except FileNotFoundError:
        return None
    if repair.generation != number:
        raise CorruptionError(f"{root}/{name} is the repair of generation {repair.generation}. {_FIX}")
    return repair


def _repair_name(number: int) -> str:
    return f"repairs/{number}.json"


def _numbered(name: str, generation: int) -> str:
    return name if generation == 1 else f"{name}.{generation}"
