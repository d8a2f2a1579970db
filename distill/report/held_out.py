"""The curves of a run flow in, what its evaluations found flows out: charts by domain, calibration, and a table."""

from collections.abc import Iterator, Mapping
from typing import Any

from distill.report.charts import Chart, calibration
from distill.report.curves import Curves, Points
from distill.report.page import Table
from distill.report.run_charts import by_domain, curve_chart

_KL = "KL(teacher‖student) for each trained token; 0 is the teacher itself."
# key of a figure -> title, caption, axis
_FIGURES = {
    "ce": ("Held-out cross-entropy", "To the data's own next token.", "nats"),
    "top1_agreement": (
        "Held-out agreement",
        "Share of tokens where the student's first choice is the teacher's.",
        "share of tokens",
    ),
    "top5_agreement": (
        "Held-out agreement of five",
        "Mean share of the teacher's first five choices among the student's first five.",
        "share of choices",
    ),
    "ece": (
        "Held-out calibration error",
        "How far the probability of the student's first choice is from how often it came: 0 is calibrated.",
        "ECE",
    ),
    "divergence": ("Held-out divergence", "The stage's own, where it is not KL(teacher‖student).", "nats"),
    "feature": ("Held-out feature loss", "Between hidden states and the teacher's.", "loss"),
    "contrastive": ("Held-out contrastive loss", "Among sequences that were read together.", "nats"),
    "attention": ("Held-out attention loss", "Between attention maps and the teacher's.", "loss"),
}
_SHARES = ("top1_agreement", "top5_agreement")
_COLUMNS = {"ce": "CE", "perplexity": "ppl", "top1_agreement": "top-1", "top5_agreement": "top-5", "ece": "ECE"}
_FEW = 0.01  # of all tokens: chance alone moves such a bin about
_WIDE = 10
_FURTHER = {"contrastive": "contrastive", "feature": "feature", "attention": "attention"}


def held_out_charts(curves: Curves) -> list[Chart]:
    """Every figure of the evaluations over the steps, by domain, and how well the student knows what it knows."""
    drawn = []
    for temperature in _temperatures(curves):
        kl = by_domain(curves, "eval/domains/", f"/kl/{temperature}")
        title = f"Held-out KL at T={temperature:g}"
        drawn.append(curve_chart(curves, title, _KL, kl, marked=True, log=_is_wide(kl)))
    for key, (title, caption, axis) in _FIGURES.items():
        series = by_domain(curves, "eval/domains/", f"/{key}")
        drawn.append(curve_chart(curves, title, caption, series, y=axis, marked=True))
    after = {f"after {stage.name}": stage.last["overall"] for stage in curves.stages if stage.last}
    drawn.append(_calibration("Calibration by stage", after))
    last = next((stage.last for stage in reversed(curves.stages) if stage.last), None)
    if last is not None and len(last["domains"]) > 1:
        drawn.append(_calibration("Calibration by domain", last["domains"]))
    return [chart for chart in drawn if chart is not None]


def held_out_table(curves: Curves) -> Table:
    """The figures before and after each stage, by domain."""
    temperatures = _temperatures(curves)
    evaluated = [
        (f"{when} {name}", domain, figures)
        for when, name, evaluation in _ends(curves)
        for domain, figures in evaluation["domains"].items()
    ]
    further = {
        key: name for key, name in _FURTHER.items() if any(figures.get(key) is not None for *_, figures in evaluated)
    }
    columns = {**_COLUMNS, **further}
    rows = [
        (
            when,
            domain,
            *(_written(figures["kl"].get(str(temperature))) for temperature in temperatures),
            *(_written(figures.get(key), share=key in _SHARES) for key in columns),
        )
        for when, domain, figures in evaluated
    ]
    return Table(
        title="Held-out figures",
        header=("", "domain", *(f"KL T={temperature:g}" for temperature in temperatures), *columns.values()),
        rows=tuple(rows),
    )


def _ends(curves: Curves) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for stage in curves.stages:
        for when, evaluation in (("before", stage.first), ("after", stage.last)):
            if evaluation is not None:
                yield when, stage.name, evaluation


def _temperatures(curves: Curves) -> list[float]:
    held = curves.under("eval/overall/kl/")
    return sorted((float(name) for name in held), reverse=True)


def _is_wide(series: Mapping[str, tuple[Points, ...]]) -> bool:
    """Whether a linear axis would hide the later, smaller values."""
    values = [y for parts in series.values() for part in parts for _, y in part]
    return max(values, default=0) > _WIDE * max(min(values, default=0), 0)


def _calibration(title: str, figures: dict[str, Any]) -> Chart | None:
    """One line for each name; None where the evaluations of an older run kept no bins."""
    bins = {name: found["calibration"] for name, found in figures.items() if found.get("calibration")}
    if not bins:
        return None
    points = {}
    for name, parts in bins.items():
        fewest = _FEW * sum(part["num_tokens"] for part in parts)
        drawn = [part for part in parts if part["num_tokens"] >= fewest]
        points[name] = ([part["confidence"] for part in drawn], [part["accuracy"] for part in drawn])
    return Chart(
        title=title,
        caption="How often the student's first choice came, against the probability that it gave: below the dotted "
        "line it is too sure of itself. Held-out tokens in bins a fifteenth wide, after the last step; bins with under "
        "1% of the tokens are in the numbers alone.",
        drawing=calibration(points),
        header=("", "probability", "share that came", "tokens"),
        rows=tuple(
            (name, f"{part['confidence']:.3f}", f"{part['accuracy']:.3f}", f"{part['num_tokens']:,}")
            for name, parts in bins.items()
            for part in parts
        ),
    )


def _written(value: float | None, *, share: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if share else f"{value:.4f}" if value < 1000 else f"{value:,.0f}"
