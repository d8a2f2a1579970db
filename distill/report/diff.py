"""Two caches flow in, every field in which they differ flows out: identity, targets, projection, sources, counts.

Caches of one identity can be trained on together; what else differs is told, and decides nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from distill.cache import storage
from distill.cache.plan import total
from distill.cache.projection import widths_of
from distill.cache.reader import CacheReader
from distill.report.table import plain_table, terminal

Section = Literal["identity", "projection", "sources", "counts", "recorded"]
_MISSING = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldDifference:
    """One field of a section, as text, in both caches."""

    section: Section
    field: str
    one: str
    two: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffReport:
    """All differences; ``same_identity`` is what writers and students ask for."""

    one: str
    two: str
    same_identity: bool
    differences: tuple[FieldDifference, ...]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def diff(one: str | Path, two: str | Path) -> DiffReport:
    """Compare two caches, sealed or not. Raises DataError when one is none, CorruptionError when one is damaged."""
    first, second = (CacheReader.open(path, allow_incomplete=True) for path in (one, two))
    return DiffReport(
        one=str(first.root),
        two=str(second.root),
        same_identity=first.identity == second.identity,
        differences=tuple(_differences(first, second)),
    )


def render_diff(report: DiffReport, *, console: Console | None = None) -> None:
    """Print the differences, and what they mean."""
    console = console or terminal()
    if report.differences:
        rows = [(d.section, d.field, d.one, d.two) for d in report.differences]
        console.print(plain_table("differences", ("", "field", report.one, report.two), rows))
    if report.same_identity:
        console.print(Text("The identity is the same: a student can train on both."))
    else:
        console.print(Text("The identities differ: these are caches of different teachers or targets."))


def _differences(one: CacheReader, two: CacheReader) -> Iterator[FieldDifference]:
    sections: tuple[tuple[Section, Mapping[str, object], Mapping[str, object]], ...] = (
        ("identity", one.identity.model_dump(mode="json"), two.identity.model_dump(mode="json")),
        ("projection", _projection(one), _projection(two)),
        ("sources", _sources(one), _sources(two)),
        ("counts", _counts(one), _counts(two)),
        ("recorded", one.recorded.model_dump(mode="json"), two.recorded.model_dump(mode="json")),
    )
    for section, ours, theirs in sections:
        for name in dict.fromkeys([*ours, *theirs]):
            mine, other = ours.get(name), theirs.get(name)
            if mine != other:
                yield FieldDifference(section=section, field=name, one=_shown(mine), two=_shown(other))


def _projection(reader: CacheReader) -> dict[str, object]:
    """Hash and widths; nothing where there is none yet."""
    path = storage.inside(reader.root, "projection.safetensors")
    if not path.exists():
        return {}
    widths = ", ".join(f"{count} × {bits} bits" for bits, count in widths_of(path))
    return {"sha256": hashlib.sha256(storage.read(path)).hexdigest(), "widths": widths}


def _sources(reader: CacheReader) -> dict[str, object]:
    """By file name: a file that moved is the same data, one whose content changed is not."""
    given: dict[str, object] = {}
    seen = Counter[str]()
    for source in reader.sources:
        name = f"{source.domain}: {Path(source.path).name}"
        seen[name] += 1
        key = name if seen[name] == 1 else f"{name} ({seen[name]})"
        given[key] = f"{source.sha256[:12]}, {source.num_rows:,} rows, {source.split or 'train and eval'}"
    return given


def _counts(reader: CacheReader) -> dict[str, object]:
    totals = total(reader.commits)
    counts: dict[str, object] = {
        "sealed": reader.sealed,
        "units": reader.num_units,
        "units committed": len(reader.commits),
        "rejects": totals.num_rejects,
        "bytes": totals.num_bytes,
    }
    for domain in reader.domains:
        sums = total(reader.units(domain))
        for name, value in (("sequences", sums.num_rows), ("targets", sums.num_targets), ("trained", sums.num_trained)):
            counts[f"{domain} train {name}"], counts[f"{domain} eval {name}"] = value.train, value.eval
    return counts


def _shown(value: object) -> str:
    if value is None:
        return _MISSING
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
