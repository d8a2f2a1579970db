"""A cache that is being filled flows in, how far it is and when it will be done flows out; from the folder alone.

Workers leave no name and no sign of life, so none is claimed: what is known of them is what they committed, when the
disk says they did, and files that no commit names.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from distill.cache import generations, storage
from distill.cache.plan import Commit, Plan, total
from distill.cache.reader import CacheReader
from distill.report.table import plain_table, terminal

_WINDOW = 64  # latest commits that the present speed is taken from


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainStatus:
    """How much of a domain is in."""

    domain: str
    num_planned: int  # units
    num_units: int
    num_rows: int
    num_targets: int
    num_rejects: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """How far a cache is. Speed and time left are those of the latest commits, all workers together.

    They are None where they cannot be known: fewer than two commits, files that were copied and bear one time, a
    bucket. The time left supposes that the workers of these commits still run.
    """

    path: str
    sealed: bool
    num_units: int
    num_committed: int
    num_input_rows: int
    num_input_rows_done: int
    num_rows: int
    num_targets: int
    num_rejects: int
    num_bytes: int
    domains: tuple[DomainStatus, ...]
    num_unnamed_files: int  # in shards/: of workers at work, or killed
    tokens_per_s: float | None
    seconds_left: float | None
    last_commit: str | None  # ISO 8601, UTC

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def status(path: str | Path) -> StatusReport:
    """How far the cache at ``path`` is, sealed or not.

    Raises DataError when there is no cache, CorruptionError when its records are damaged.
    """
    reader = CacheReader.open(path, allow_incomplete=True)
    sums = total(reader.commits)
    num_input_rows = sum(source.num_rows for source in reader.sources)
    ended = _commit_times(reader)
    speed = _speed(reader.commits, ended)
    rows_left = num_input_rows - sums.num_input_rows
    return StatusReport(
        path=str(reader.root),
        sealed=reader.sealed,
        num_units=reader.num_units,
        num_committed=len(reader.commits),
        num_input_rows=num_input_rows,
        num_input_rows_done=sums.num_input_rows,
        num_rows=sums.num_rows.total,
        num_targets=sums.num_targets.total,
        num_rejects=sums.num_rejects,
        num_bytes=sums.num_bytes,
        domains=_domains(reader),
        num_unnamed_files=_num_unnamed(reader),
        tokens_per_s=speed[0] if speed else None,
        seconds_left=rows_left / speed[1] if speed and not reader.sealed else None,
        last_commit=datetime.fromtimestamp(max(ended), UTC).isoformat(timespec="seconds") if ended else None,
    )


def render_status(report: StatusReport, *, console: Console | None = None) -> None:
    """Print how far a cache is."""
    console = console or terminal()
    rows = [
        (
            domain.domain,
            f"{domain.num_units:,} of {domain.num_planned:,}",
            f"{domain.num_rows:,}",
            f"{domain.num_targets:,}",
            f"{domain.num_rejects:,}",
        )
        for domain in report.domains
    ]
    console.print(plain_table("committed", ("domain", "units", "sequences", "targets", "rejects"), rows))
    state = "sealed" if report.sealed else "not sealed"
    lines = [
        f"{report.path}: {report.num_committed:,} of {report.num_units:,} units, {report.num_input_rows_done:,} of "
        f"{report.num_input_rows:,} input rows, {report.num_targets:,} targets, "
        f"{report.num_bytes / 1e6:,.1f} MB; {state}"
    ]
    if report.tokens_per_s is not None:
        left = "" if report.seconds_left is None else f"; at this speed {_duration(report.seconds_left)} are left"
        lines.append(f"{report.tokens_per_s:,.0f} tokens/s by the latest commits{left}")
    if report.last_commit:
        lines.append(f"last commit: {report.last_commit}")
    if report.num_unnamed_files:
        lines.append(f"files of units that are being written, or were when a worker died: {report.num_unnamed_files}")
    for line in lines:
        console.print(Text(line))


def _domains(reader: CacheReader) -> tuple[DomainStatus, ...]:
    units = reader.description.units if isinstance(reader.description, Plan) else reader.commits
    planned = Counter(unit.domain for unit in units)
    return tuple(_domain(reader, domain, num_planned=planned[domain]) for domain in planned)


def _domain(reader: CacheReader, domain: str, *, num_planned: int) -> DomainStatus:
    commits = reader.units(domain)
    sums = total(commits)
    return DomainStatus(
        domain=domain,
        num_planned=num_planned,
        num_units=len(commits),
        num_rows=sums.num_rows.total,
        num_targets=sums.num_targets.total,
        num_rejects=sums.num_rejects,
    )


def _commit_times(reader: CacheReader) -> list[float]:
    """When each commit was created, by the disk's clock, in the order of ``reader.commits``; nothing for a bucket."""
    if not isinstance(reader.root, Path):
        return []
    names = generations.current(reader.root)
    paths = [storage.inside(reader.root, names.commit_name(commit.unit)) for commit in reader.commits]
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return times if len(times) == len(paths) else []


def _speed(commits: Sequence[Commit], ended: Sequence[float]) -> tuple[float, float] | None:
    """Targets and input rows a second over the latest commits; a commit's time is the end of its unit.

    So the work of the earliest of them was done before the interval and is left out.
    """
    latest = sorted(zip(ended, commits, strict=False), key=lambda pair: pair[0])[-_WINDOW:]
    seconds = latest[-1][0] - latest[0][0] if latest else 0.0
    if seconds <= 0:
        return None
    sums = total([commit for _, commit in latest[1:]])
    return sums.num_targets.total / seconds, sums.num_input_rows / seconds


def _num_unnamed(reader: CacheReader) -> int:
    named = {commit.shard for commit in reader.commits}
    return len(set(storage.names(reader.root, "shards")) - named)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
