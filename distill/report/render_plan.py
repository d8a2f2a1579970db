"""A plan flows in, tables on the terminal flow out."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.report.plan_record import Cost, Interval, Memory, PlanReport
from distill.report.table import plain_table, terminal
from distill.teacher.measure import Measured


def render_plan(report: PlanReport, *, console: Console | None = None) -> None:
    """Print what a cache would hold, take and cost, and what was measured."""
    console = console or terminal()
    for table in _tables(report):
        console.print(table)
    if report.cost:
        console.print(Text(_cost(report.cost)))
    if report.proposal:
        console.print(Text("proposed:"))
    for reason in report.proposal.reasons if report.proposal else ():
        console.print(Text(f"- {reason}."))
    for note in report.notes:
        console.print(Text(f"Note: {note}."))


def _tables(report: PlanReport) -> Iterator[Table]:
    yield _counts(report)
    if report.counts.rejects:
        rows = [(reject.domain, reject.reason, f"{reject.num_rows:,}") for reject in report.counts.rejects]
        yield plain_table("rows that become no sequence", ("domain", "reason", "rows"), rows)
    yield _storage(report)
    if report.memory:
        yield _weights(report.memory)
        yield _working(report)
    if report.measured:
        yield _masses(report.measured)
        yield _distances(report.measured)
        yield _rates(report.measured)


def _counts(report: PlanReport) -> Table:
    counts = report.counts
    rows = [
        (
            split.domain,
            split.split,
            *(f"{number:,}" for number in (split.num_rows, split.num_tokens, split.num_targets, split.num_trained)),
        )
        for split in counts.splits
    ]
    read = (
        ""
        if counts.targets_interval is None
        else f"; {counts.num_read:,} were read, {_span(counts.targets_interval)} targets"
    )
    title = f"{report.teacher}: {counts.num_input_rows:,} input rows in {counts.num_units:,} units{read}"
    return plain_table(title, ("domain", "split", "sequences", "tokens", "targets", "trained"), rows)


def _storage(report: PlanReport) -> Table:
    storage, num = report.storage, report.counts.num_targets
    rows = [(name, f"{size / num:.2f}", size_text(size)) for name, size in storage.columns.items()]
    rows.append(("all shards", f"{storage.bytes_per_target:.2f}", size_text(storage.shards)))
    if storage.projection:
        rows.append(("projection, fidelity", "", size_text(storage.projection + storage.fidelity)))
    interval = storage.shards_interval
    span = f", {size_text(interval.low)} to {size_text(interval.high)}" if interval else ""
    return plain_table(f"on disk ({storage.source} sizes{span})", ("column", "bytes/target", "total"), rows)


def _weights(memory: Memory) -> Table:
    rows = [
        (
            f"{weights.dtype} *" if weights.dtype == memory.dtype else weights.dtype,
            size_text(weights.num_bytes),
            "–" if weights.tensor_parallel_size is None else str(weights.tensor_parallel_size),
        )
        for weights in memory.weights
    ]
    return plain_table(
        f"weights: {memory.num_parameters / 1e9:,.2f} billion parameters", ("", "size", "tensor_parallel_size"), rows
    )


def _working(report: PlanReport) -> Table:
    memory, flops = report.memory, report.flops
    assert memory is not None
    assert flops is not None
    rows = [
        (f"LM head, {memory.head_rows:,} positions at a time on a GPU", size_text(memory.head_bytes)),
        (f"KV cache, {memory.kv_tokens:,} tokens of the window", size_text(memory.kv_bytes)),
        (f"activations, steps of {memory.batch_tokens:,} tokens", size_text(memory.activation_bytes)),
        ("FLOPs of a target: layers", f"{flops.body / 1e9:,.3f} GFLOP"),
        ("FLOPs of a target: LM head", f"{flops.head / 1e9:,.3f} GFLOP"),
        ("FLOPs of a target: projection", f"{flops.projection / 1e9:,.3f} GFLOP"),
    ]
    return plain_table("capture", ("", ""), rows)


def _masses(measured: Measured) -> Table:
    temperatures = list(dict.fromkeys(mass.temperature for mass in measured.masses))
    by_k: dict[int, list[str]] = {}
    for mass in measured.masses:
        by_k.setdefault(mass.top_k, []).append(f"{mass.mass:.3f}")
    header = ("k", *(f"T={temperature:g}" for temperature in temperatures))
    return plain_table(
        f"the teacher's mass in its k likeliest ids ({measured.num_trained:,} trained targets)",
        header,
        [(f"{top_k}", *cells) for top_k, cells in by_k.items()],
    )


def _distances(measured: Measured) -> Table:
    temperatures = list(dict.fromkeys(item.temperature for item in measured.distances))
    by_choice: dict[tuple[int, str, int], list[str]] = {}
    for item in measured.distances:
        key = (item.top_k, item.kind.replace("_", "-"), item.hidden_bytes)
        by_choice.setdefault(key, []).append(f"{item.total_variation:.3f}")
    header = ("k", "tail", "hidden bytes", *(f"T={temperature:g}" for temperature in temperatures))
    rows = [(f"{k}", kind, str(size) if size else "", *cells) for (k, kind, size), cells in by_choice.items()]
    return plain_table(f"total variation to the teacher ({measured.num_compared:,} positions)", header, rows)


def _rates(measured: Measured) -> Table:
    rows = [
        ("capture", f"{measured.capture_tokens_per_s:,.0f} tokens/s"),
        ("layers alone", f"{measured.prefill_tokens_per_s:,.0f} tokens/s"),
    ]
    return plain_table(f"measured here, on {measured.num_tokens:,} tokens", ("", ""), rows)


def _cost(cost: Cost) -> str:
    price = "" if cost.price is None else f", price {cost.price:,.2f}"
    return (
        f"{cost.num_tokens:,} tokens (calibration included) at {cost.tokens_per_s:,.0f} tokens/s ({cost.source}) on "
        f"{cost.num_gpus} GPU{'' if cost.num_gpus == 1 else 's'}: {cost.hours:,.2f} hours, {cost.gpu_hours:,.2f} "
        f"GPU-hours{price}."
    )


def _span(interval: Interval) -> str:
    return f"{interval.low:,.0f} to {interval.high:,.0f}"


def size_text(num_bytes: float) -> str:
    """Bytes for people: "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
