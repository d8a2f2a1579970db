"""A run flows in, the page about it flows out: losses, schedules, and how close each stage came to the teacher."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from distill import __version__
from distill.report.charts import Chart, Line, lines
from distill.report.curves import Curves, Points, read_run
from distill.report.page import Page, Table

_LOSSES = {"total": "total", "kl": "KL", "ce": "cross-entropy"}
_STEPS = "optimizer step"


def run_page(path: Path) -> Page:
    """The page of the run, or of the one stage, at ``path``. Raises DataError when it holds no metrics."""
    curves = read_run(path)
    names = ", ".join(stage.name for stage in curves.stages)
    return Page(
        title=f"Run {path.resolve().name}",
        subtitle=f"{path} · {names}",
        facts=_facts(curves),
        charts=tuple(chart for chart in _charts(curves) if chart is not None),
        tables=(_held_out_table(curves),),
        foot=f"Made by distill {__version__}. Dotted lines part the stages; steps are counted on over them.",
    )


def _facts(curves: Curves) -> tuple[tuple[str, str], ...]:
    facts = [(f"{stage.num_steps:,}", f"steps of {stage.name}") for stage in curves.stages]
    tokens = sum(value for part in curves.series.get("train/tokens", ()) for _, value in part)
    facts.append((f"{tokens:,.0f}", "tokens trained on"))
    last = next((stage.last for stage in reversed(curves.stages) if stage.last), None)
    if last:
        facts.append((f"{last['overall']['top1_agreement']:.1%}", "held-out agreement with the teacher, last"))
        facts.append((f"{last['overall']['ce']:.3f}", "held-out cross-entropy, last"))
    return tuple(facts)


def _charts(curves: Curves) -> list[Chart | None]:
    losses = {_LOSSES.get(name, name): parts for name, parts in curves.under("train/losses/").items()}
    balanced = {_LOSSES.get(name, name): parts for name, parts in curves.under("train/weights/").items()}
    charts = [
        _chart(curves, "Training losses", "Each term before its weight; total is what is minimised.", losses, log=True),
        _chart(
            curves, "Learning rate", "Warm-up and decay of each stage.", _one(curves, "train/lr"), y="learning rate"
        ),
        _chart(curves, "Gradient norm", "Before clipping.", _one(curves, "train/grad_norm"), y="norm", log=True),
        _chart(curves, "Balanced weights", "Of the losses, as balancing sets them.", balanced, y="weight", log=True),
        _shares(curves),
    ]
    for temperature in _temperatures(curves):
        kl = _by_domain(curves, "eval/domains/", f"/kl/{temperature}")
        words = "KL(teacher‖student) for each trained token; 0 is the teacher itself."
        charts.append(_chart(curves, f"Held-out KL at T={temperature:g}", words, kl, marked=True))
    ce = _by_domain(curves, "eval/domains/", "/ce")
    charts.append(_chart(curves, "Held-out cross-entropy", "To the data's own next token.", ce, marked=True))
    agreement = _by_domain(curves, "eval/domains/", "/top1_agreement")
    words = "Share of tokens where the student's first choice is the teacher's."
    charts.append(_chart(curves, "Held-out agreement", words, agreement, y="share of tokens", marked=True))
    return charts


def _temperatures(curves: Curves) -> list[float]:
    held = curves.under("eval/overall/kl/")
    return sorted((float(name) for name in held), reverse=True)


def _one(curves: Curves, name: str) -> dict[str, tuple[Points, ...]]:
    return {"": curves.series[name]} if name in curves.series else {}


def _by_domain(curves: Curves, prefix: str, suffix: str) -> dict[str, tuple[Points, ...]]:
    return {name.removesuffix(suffix): parts for name, parts in curves.under(prefix).items() if name.endswith(suffix)}


def _chart(
    curves: Curves,
    title: str,
    caption: str,
    series: Mapping[str, tuple[Points, ...]],
    *,
    y: str = "nats",
    marked: bool = False,
    log: bool = False,
) -> Chart | None:
    if not series:
        return None
    colours = _colours(curves, series)
    drawn = [Line(label=name, parts=_parts(parts), colour=colours[name]) for name, parts in series.items()]
    positive = all(y > 0 for parts in series.values() for part in parts for _, y in part)
    scale = "log" if log and positive else "linear"
    return Chart(
        title=title,
        caption=caption,
        svg=lines(
            drawn, labels=(_STEPS, y), marked=marked, boundaries=_boundaries(curves), xlim=_whole(curves), yscale=scale
        ),
        header=("", "first", "last"),
        rows=tuple((name or y, *_ends(parts)) for name, parts in series.items()),
    )


def _shares(curves: Curves) -> Chart | None:
    realised = _by_domain(curves, "train/shares/", "/realised")
    if not realised:
        return None
    colours = _colours(curves, realised)
    scheduled = _by_domain(curves, "train/shares/", "/scheduled")
    drawn = [
        Line(label=f"{domain}{words}", parts=_parts(series[domain]), colour=colours[domain], style=style)
        for domain in realised
        for style, (series, words) in enumerate(((realised, ""), (scheduled, ", scheduled")))
        if domain in series
    ]
    return Chart(
        title="Domains' shares",
        caption="Of all sequences of the stage so far: what was drawn, and what the schedule asks for.",
        svg=lines(
            drawn, labels=(_STEPS, "share"), boundaries=_boundaries(curves), xlim=_whole(curves), ylim=(-0.03, 1.03)
        ),
        header=("", "first", "last"),
        rows=tuple((domain, *_ends(parts)) for domain, parts in realised.items()),
    )


def _parts(parts: tuple[Points, ...]) -> list[tuple[list[float], list[float]]]:
    return [([x for x, _ in part], [y for _, y in part]) for part in parts if part]


def _ends(parts: tuple[Points, ...]) -> tuple[str, str]:
    values = [y for part in parts for _, y in part]
    return f"{values[0]:.4g}", f"{values[-1]:.4g}"


def _boundaries(curves: Curves) -> list[float]:
    return [stage.start for stage in curves.stages[1:]]


def _whole(curves: Curves) -> tuple[float, float]:
    """The common axis of every chart of the page, with room for the first and last marks."""
    last = curves.stages[-1].start + curves.stages[-1].num_steps
    return (-0.03 * last, 1.03 * max(last, 1))


def _colours(curves: Curves, names: Iterable[str]) -> dict[str, int]:
    """A domain has one colour on every chart; other series are counted."""
    domains = sorted({*_by_domain(curves, "eval/domains/", "/ce"), *_by_domain(curves, "train/shares/", "/realised")})
    return {name: domains.index(name) if name in domains else number for number, name in enumerate(names)}


def _held_out_table(curves: Curves) -> Table:
    temperatures = _temperatures(curves)
    rows = []
    for stage in curves.stages:
        for when, evaluation in (("before", stage.first), ("after", stage.last)):
            for domain, figures in (evaluation or {}).get("domains", {}).items():
                kl = [figures["kl"].get(str(temperature)) for temperature in temperatures]
                written = ["" if value is None else f"{value:.4f}" for value in kl]
                others = (f"{figures['ce']:.4f}", f"{figures['top1_agreement']:.1%}")
                rows.append((f"{when} {stage.name}", domain, *written, *others))
    return Table(
        title="Held-out figures",
        header=("", "domain", *(f"KL T={temperature:g}" for temperature in temperatures), "CE", "agree"),
        rows=tuple(rows),
    )
