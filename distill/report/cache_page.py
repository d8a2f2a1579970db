"""A cache flows in, the page about it flows out: what it holds, how close it is to its teacher, what it costs."""

from pathlib import Path
from typing import Any

import numpy as np

from distill import __version__
from distill.cache.reader import CacheReader
from distill.report.charts import Chart, Line, bars, grouped_bars, histograms, lines
from distill.report.distributions import Distributions, sample
from distill.report.inspect import InspectReport, inspect
from distill.report.pace import Pace, pace_of
from distill.report.page import Page, Table
from distill.report.tokens import cache_views

_TARGETS = {"low_rank": "low-rank tail", "bucket": "uniform tail", "renormalised": "renormalised top-k"}
_MOST_BARS = 8
_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def cache_page(path: str | Path) -> Page:
    """The page of the cache at ``path``, sealed or not.

    Raises DataError when there is no cache, CorruptionError when what is read of it is damaged, UsageError without
    matplotlib.
    """
    report = inspect(path)
    reader = CacheReader.open(path, allow_incomplete=True)
    found, pace = sample(reader), pace_of(reader)
    state = "sealed" if report.sealed else f"incomplete: {report.num_committed} of {report.num_units} units committed"
    return Page(
        title=f"Cache of {_name(str(report.recorded['teacher']))}",
        subtitle=f"{report.path} · {state}",
        facts=_facts(report),
        summary=_counts(report),
        groups=(("Charts", (*_charts(report, found), *([_pace(pace)] if pace else []))),),
        views=cache_views(reader),
        tables=(_identity(report), _recorded(report)),
        foot=f"Made by distill {__version__}. Curves and histograms are over {found.num_targets:,} targets of "
        f"{found.num_sampled_units} units.",
    )


def _name(teacher: str) -> str:
    """A hub name as it is, a folder by its last part; the whole path stands in the table of what was recorded."""
    return Path(teacher).name if Path(teacher).is_absolute() else teacher


def _facts(report: InspectReport) -> tuple[tuple[str, str], ...]:
    num_rows = sum(count.num_rows for count in report.counts)
    num_targets = sum(count.num_targets for count in report.counts)
    num_trained = sum(count.num_trained for count in report.counts)
    per_token = sum(report.bytes_per_token.values())
    facts = [
        (f"{num_rows:,}", "sequences"),
        (f"{num_targets:,}", "targets"),
        (f"{num_trained:,}", "of them trained"),
        (f"{report.num_rejects:,}", "input rows rejected"),
        (f"{per_token:.0f} B", "per target on disk"),
        (_size(per_token * num_targets), "in shards"),
    ]
    if report.explained is not None:
        facts.append((f"{report.explained:.1%}", "of the logit variance kept by the projection"))
    return tuple(facts)


def _charts(report: InspectReport, found: Distributions) -> list[Chart]:
    charts = []
    if found.num_targets:
        charts.append(_mass(report, found))
    if report.fidelity:
        charts.append(_fidelity(report))
    if any(len(values) for values in found.entropy.values()):
        charts.append(_entropy(found))
    if found.num_targets:
        charts.append(_lengths(found))
        charts.append(_bytes(report))
    if found.rejects:
        charts.append(_rejects(found))
    return charts


def _mass(report: InspectReport, found: Distributions) -> Chart:
    temperatures = [float(value) for value in report.identity["temperatures"]]
    num = found.mass_TK.shape[1]
    ranks = np.arange(1, num + 1)
    ticks = [2**power for power in range(num.bit_length()) if 2**power <= num]
    drawn = [
        Line(label=f"T={temperature:g}", parts=[(ranks, found.mass_TK[index])], colour=index)
        for index, temperature in enumerate(temperatures)
    ]
    kept = sorted({*ticks, num})
    return Chart(
        title="Teacher's mass inside its k likeliest ids",
        caption="What a cache of the top-k alone would hold. The rest is the tail, whose mass is stored exactly.",
        drawing=lines(drawn, labels=("k", "mass"), xscale="log", xticks=ticks, ylim=(0, 1.02)),
        header=("k", *(f"T={temperature:g}" for temperature in temperatures)),
        rows=tuple((str(k), *(f"{mass:.3f}" for mass in found.mass_TK[:, k - 1])) for k in kept),
    )


def _fidelity(report: InspectReport) -> Chart:
    names = [name for name in _TARGETS if any(getattr(item, name) is not None for item in report.fidelity)]
    groups = [f"T={item.temperature:g}" for item in report.fidelity]
    values = {_TARGETS[name]: [getattr(item, name) for item in report.fidelity] for name in names}
    return Chart(
        title="Distance of the targets to the teacher",
        caption=f"Mean total variation over {report.num_fidelity_positions:,} held-out positions: 0 is the teacher "
        "itself, 1 has nothing in common with it. Students train on the low-rank tail unless told otherwise.",
        drawing=grouped_bars(groups, values, labels=("temperature", "total variation")),
        header=("", *groups),
        rows=tuple((name, *(f"{value:.4f}" for value in heights)) for name, heights in values.items()),
    )


def _entropy(found: Distributions) -> Chart:
    filled = {domain: values for domain, values in found.entropy.items() if len(values)}
    return Chart(
        title="Where the teacher is sure",
        caption="Entropy of its next token at T=1, over trained targets. Near 0 it knows; there the hard label says it "
        "all.",
        drawing=histograms(filled, labels=("entropy, nats", "share of targets")),
        header=("domain", "mean", "median", "95% below"),
        rows=tuple(
            (domain, *(f"{number:.3f}" for number in (values.mean(), *np.quantile(values, (0.5, 0.95)))))
            for domain, values in filled.items()
        ),
    )


def _lengths(found: Distributions) -> Chart:
    return Chart(
        title="Length of sequences",
        caption="Tokens, prompt and answer together. Training cuts them at its own max_length.",
        drawing=histograms(found.lengths, labels=("tokens", "share of sequences")),
        header=("domain", "median", "95% below", "longest"),
        rows=tuple(
            (domain, *(f"{number:,.0f}" for number in (*np.quantile(values, (0.5, 0.95)), values.max())))
            for domain, values in found.lengths.items()
        ),
    )


def _bytes(report: InspectReport) -> Chart:
    sizes = sorted(report.bytes_per_token.items(), key=lambda item: -item[1])
    shown, rest = sizes[:_MOST_BARS], sizes[_MOST_BARS:]
    if rest:
        shown = [*shown, (f"{len(rest)} others", sum(size for _, size in rest))]
    return Chart(
        title="Bytes per target, by column",
        caption="Compressed, as on disk.",
        drawing=bars(shown, label="bytes"),
        header=("column", "bytes"),
        rows=tuple((name, f"{size:.2f}") for name, size in sizes),
    )


def _rejects(found: Distributions) -> Chart:
    return Chart(
        title="Rejected input rows, by reason",
        caption="N stands for a number. The folder rejects/ names file and line of each.",
        drawing=bars(found.rejects[:_MOST_BARS], label="rows"),
        header=("reason", "rows"),
        rows=tuple((reason, f"{count:,}") for reason, count in found.rejects),
    )


def _pace(pace: Pace) -> Chart:
    unit, length = next((unit for unit in _UNITS if pace.seconds >= 2 * unit[1]), _UNITS[-1])
    return Chart(
        title="Throughput while the cache was made",
        caption="Targets committed in a second by all writers together, pauses included. By the modification times of "
        "the commit records; the first unit is left out, as nothing says when it began.",
        drawing=lines(
            [Line(label="", parts=[(pace.middles / length, pace.rates)], colour=0)],
            labels=(f"{unit} after the first commit", "targets/s"),
            marked=True,
            ylim=(0, 1.1 * float(pace.rates.max())),
        ),
        header=("targets", unit, "mean targets/s", "fastest", "slowest"),
        rows=(
            (
                f"{pace.num_targets:,}",
                f"{pace.seconds / length:.3g}",
                f"{pace.num_targets / pace.seconds:,.1f}",
                f"{pace.rates.max():,.1f}",
                f"{pace.rates.min():,.1f}",
            ),
        ),
    )


def _counts(report: InspectReport) -> Table:
    return Table(
        title="Sequences",
        header=("domain", "split", "sequences", "targets", "trained"),
        rows=tuple(
            (count.domain, count.split, f"{count.num_rows:,}", f"{count.num_targets:,}", f"{count.num_trained:,}")
            for count in report.counts
        ),
    )


def _identity(report: InspectReport) -> Table:
    return Table(title="Identity: what must match", rows=_pairs(report.identity), pairs=True)


def _recorded(report: InspectReport) -> Table:
    return Table(title="Recorded: how it was made", rows=_pairs(report.recorded), pairs=True)


def _pairs(values: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, _plain(value)) for name, value in values.items() if value not in (None, "", {}))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"
