"""Reports flow in, text on the terminal flows out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from distill.report.inspect import InspectReport, RowView
from distill.report.table import plain_table
from distill.report.verify import VerifyReport


def render_inspect(report: InspectReport, *, console: Console | None = None) -> None:
    """Print what a cache holds, its error at each temperature, and one row."""
    console = console or Console(highlight=False)
    state = "sealed" if report.sealed else f"incomplete: {report.num_committed} of {report.num_units} units committed"
    console.print(Text(f"{report.path}: {state}, {report.num_rejects:,} rows rejected"))
    console.print(plain_table("identity (must match)", ("", ""), report.identity.items()))
    console.print(
        plain_table("recorded", ("", ""), ((name, value) for name, value in report.recorded.items() if value))
    )
    counts = [
        (count.domain, count.split, f"{count.num_rows:,}", f"{count.num_targets:,}", f"{count.num_trained:,}")
        for count in report.counts
    ]
    console.print(plain_table("sequences", ("domain", "split", "sequences", "targets", "trained"), counts))
    sizes = [(name, f"{size:.2f}") for name, size in report.bytes_per_token.items()]
    sizes.append(("all", f"{sum(report.bytes_per_token.values()):.2f}"))
    console.print(plain_table("bytes per token", ("column", "bytes"), sizes))
    _print_fidelity(report, console)
    if report.row:
        _print_row(report.row, console)


def render_verify(report: VerifyReport, *, console: Console | None = None) -> None:
    """Print what was read and everything that is wrong."""
    console = console or Console(highlight=False)
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
    console = console or Console(highlight=False)
    rows = [
        (
            str(stage["stage"]),
            f"{stage['num_steps']:,}" + (" (finished before)" if stage["already_finished"] else ""),
            f"{stage['best_step']:,}",
            _number(stage["objective"]),
            _stage_figures(stage["evaluation"]),
            str(stage["best"]),
        )
        for stage in stages
    ]
    header = ("stage", "steps", "best step", "held-out loss", "held-out KL, cross-entropy", "best checkpoint")
    console.print(plain_table("stages", header, rows))
    for stage in stages:
        for note in stage["notes"]:
            console.print(Text(f"stage {stage['stage']}: {note}"))


def render_rows(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, more: bool, console: Console | None = None
) -> None:
    """Print the rows of a query, and whether there are ``more``."""
    console = console or Console(highlight=False)
    console.print(plain_table("", columns, [[_cell(value) for value in row] for row in rows]))
    if more:
        console.print(Text(f"the first {len(rows):,} rows; raise --limit, or take all with --csv or --json"))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _stage_figures(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "–"
    lines = []
    for domain, figures in evaluation["domains"].items():
        divergences = ", ".join(f"{value:.4f} at T={temperature:g}" for temperature, value in figures["kl"].items())
        lines.append(f"{domain}: KL {divergences}; CE {figures['ce']:.4f}")
    return "\n".join(lines)


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
    about = ", ".join([row.domain, row.split, row.source, *(f"{key}={value}" for key, value in row.metadata.items())])
    rows = [
        (
            "●" if position.trained else "",
            repr(position.token)[1:-1],
            repr(position.next_token)[1:-1],
            f"{position.entropy:.2f}",
            "  ".join(f"{repr(text)[1:-1]} {probability:.3f}" for text, probability in position.alternatives),
        )
        for position in row.positions
    ]
    header = ("trained", "token", "next token", "entropy", "what the teacher expected next")
    console.print(plain_table(f"row {row.row} of unit {row.unit}: {about}", header, rows))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
