"""Reports flow in, text on the terminal flows out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from distill.report.inspect import InspectReport, RowView
from distill.report.table import plain_table, terminal
from distill.report.verify import VerifyReport

_SMALL = 0.02  # of all bytes; smaller columns are shown together


def render_inspect(report: InspectReport, *, console: Console | None = None) -> None:
    """Print what a cache holds, its error at each temperature, and one row."""
    console = console or terminal()
    state = "sealed" if report.sealed else f"incomplete: {report.num_committed} of {report.num_units} units committed"
    console.print(Text(f"{report.path}: {state}, {report.num_rejects:,} rows rejected\n"))
    counts = [
        (count.domain, count.split, f"{count.num_rows:,}", f"{count.num_targets:,}", f"{count.num_trained:,}")
        for count in report.counts
    ]
    console.print(plain_table("sequences", ("domain", "split", "sequences", "targets", "trained"), counts))
    _print_fidelity(report, console)
    console.print(plain_table("bytes per token", ("column", "bytes"), _sizes(report.bytes_per_token)))
    console.print(plain_table("identity (must match)", ("", ""), _pairs(report.identity)))
    console.print(plain_table("recorded", ("", ""), _pairs(report.recorded)))
    if report.row:
        _print_row(report.row, console)


def render_verify(report: VerifyReport, *, console: Console | None = None) -> None:
    """Print what was read and everything that is wrong."""
    console = console or terminal()
    if report.problems:
        rows = [(problem.unit or "", problem.file, problem.text) for problem in report.problems]
        console.print(plain_table("problems", ("unit", "file", "problem"), rows))
    units = f"{report.num_committed} of {report.num_units} units"
    size = f"{report.num_rows:,} rows, {report.num_rejects:,} rejects, {report.num_bytes / 1e6:,.1f} MB"
    verdict = "every byte is as committed" if report.ok else f"{len(report.problems)} problems"
    state = "" if report.sealed else " (not sealed)"
    console.print(Text(f"{report.path}{state}: {units}, {size}: {verdict}."))


def render_stages(stages: Sequence[Mapping[str, Any]], *, console: Console | None = None) -> None:
    """Print finished stages, given as the ``as_dict()`` of their results."""
    console = console or terminal()
    rows = [row for stage in stages for row in _stage_rows(stage)]
    temperatures = sorted({temperature for row in rows for temperature in row[4]}, reverse=True)
    table = [
        (*row, *(_number(kl.get(temperature)) for temperature in temperatures), _number(ce)) for *row, kl, ce in rows
    ]
    header = ("stage", "steps", "best step", "domain", *(f"KL T={temperature:g}" for temperature in temperatures), "CE")
    console.print(plain_table("held out", header, table))
    for stage in stages:
        for note in stage["notes"]:
            console.print(Text(f"stage {stage['stage']}: {note}"))
        finished = " (finished before)" if stage["already_finished"] else ""
        console.print(Text(f"stage {stage['stage']}{finished}: best checkpoint {stage['best']}"))


def render_rows(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, more: bool, console: Console | None = None
) -> None:
    """Print the rows of a query, and whether there are ``more``."""
    console = console or terminal()
    console.print(plain_table("", columns, [[_cell(value) for value in row] for row in rows]))
    if more:
        console.print(Text(f"the first {len(rows):,} rows; raise --limit, or take all with --csv or --json"))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _stage_rows(stage: Mapping[str, Any]) -> list[tuple[str, str, str, str, Mapping[float, float], float | None]]:
    """A row for each domain that was measured; the first says what the stage was."""
    about = (str(stage["stage"]), f"{stage['num_steps']:,}", f"{stage['best_step']:,}")
    evaluation = stage["evaluation"]
    if evaluation is None:
        return [(*about, "–", {}, None)]
    measured = evaluation["domains"].items()
    return [
        (*(about if number == 0 else ("", "", "")), domain, figures["kl"], figures["ce"])
        for number, (domain, figures) in enumerate(measured)
    ]


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values; what was not given is left out."""
    return [(name, _plain(value)) for name, value in values.items() if value is not None and value != ""]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sizes(bytes_per_token: Mapping[str, float]) -> list[tuple[str, str]]:
    """Columns by size, small ones together."""
    whole = sum(bytes_per_token.values())
    by_size = sorted(bytes_per_token.items(), key=lambda item: -item[1])
    large = [(name, size) for name, size in by_size if size >= _SMALL * whole]
    others = len(by_size) - len(large)
    rows = [*large, (f"{others} others", whole - sum(size for _, size in large)), ("all", whole)]
    return [(name, f"{size:.2f}") for name, size in rows]


def _print_fidelity(report: InspectReport, console: Console) -> None:
    measured = {item.temperature: item for item in report.fidelity}
    rows = []
    for temperature, mass in report.topk_mass.items():
        item = measured.get(temperature)
        distances = (item.low_rank, item.bucket, item.renormalised) if item else (None, None, None)
        rows.append((f"{temperature:g}", f"{mass:.3f}", *(_number(distance) for distance in distances)))
    header = ("temperature", "mass in top-k", "low-rank tail", "uniform tail", "renormalised top-k")
    console.print(plain_table("total variation to the teacher (0: the same, 1: disjoint)", header, rows))
    if report.explained is not None:
        console.print(Text(f"the projection keeps {report.explained:.1%} of the logit variance"))
    console.print(
        Text(
            f"means over {report.num_mass_targets:,} targets and {report.num_fidelity_positions:,} held-out positions\n"
        )
    )


def _print_row(row: RowView, console: Console) -> None:
    """Token by token: whether it trains, and what the teacher, who had read all before it, expected in its place."""
    about = ", ".join([row.domain, row.split, row.source, *(f"{key}={value}" for key, value in row.metadata.items())])
    rows = [("", _token(row.positions[0].token), "", "")] if row.positions else []
    rows += [
        (
            "●" if position.trained else "",
            _token(position.next_token),
            f"{position.entropy:.2f}",
            "  ".join(f"{_token(text)} {probability:.3f}" for text, probability in position.alternatives),
        )
        for position in row.positions
    ]
    header = ("trained", "token", "entropy", "what the teacher expected there")
    console.print(plain_table(f"row {row.row} of unit {row.unit}: {about}", header, rows))


def _token(text: str) -> str:
    """Visible whatever it is: a leading space is part of a token."""
    return repr(text)[1:-1].replace(" ", "␣")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
