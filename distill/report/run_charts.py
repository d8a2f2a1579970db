"""The curves of a run flow in, the charts of its training flow out: losses, schedules, shares, gradients."""

from collections.abc import Iterable, Mapping

from distill.report.charts import Chart, Line, lines
from distill.report.curves import Curves, Points

Series = Mapping[str, tuple[Points, ...]]
_LOSSES = {"total": "total", "kl": "KL", "ce": "cross-entropy"}
_STEPS = "optimizer step"


def training_charts(curves: Curves) -> list[Chart]:
    """What each step reported; a chart without a curve is left out."""
    norms = curves.under("train/gradient_norms/")
    by_loss = {name: parts for name, parts in norms.items() if not name.startswith("domain/")}
    drawn = [
        curve_chart(
            curves,
            "Training losses",
            "Each term before its weight; total is what is minimised.",
            _named(curves.under("train/losses/")),
            log=True,
        ),
        curve_chart(curves, "Learning rate", "Warm-up and decay of each stage.", _one(curves, "train/lr"), y="rate"),
        curve_chart(curves, "Temperature", "Of the divergence.", _one(curves, "train/temperature"), y="temperature"),
        curve_chart(
            curves,
            "Loss weights",
            "As schedule and balancing set them.",
            _named(curves.under("train/weights/")),
            y="weight",
            log=True,
        ),
        curve_chart(
            curves,
            "Domains' factors",
            "On their losses, as balancing sets them: 1 changes nothing.",
            curves.under("train/domain_weights/"),
            y="factor",
        ),
        _shares(curves),
        curve_chart(
            curves,
            "Sampling weights",
            "Of groups, as evaluations set them: 1 is the mean, and a higher one comes more often.",
            curves.under("sampling/weights/"),
            y="weight",
            marked=True,
        ),
        curve_chart(
            curves,
            "Gradient norm",
            "Of all losses together, before clipping.",
            _one(curves, "train/grad_norm"),
            y="norm",
            log=True,
        ),
        curve_chart(
            curves,
            "Gradient norms of losses",
            "Each alone and unweighted, where it was measured.",
            _named(by_loss),
            y="norm",
            log=True,
        ),
        curve_chart(
            curves,
            "Gradient norms of domains",
            "Of each one's own tokens, all losses weighted, where it was measured.",
            curves.under("train/gradient_norms/domain/"),
            y="norm",
            log=True,
        ),
        curve_chart(
            curves, "Speed", "Trained tokens in a second.", _one(curves, "train/tokens_per_second"), y="tokens/s"
        ),
    ]
    return [chart for chart in drawn if chart is not None]


def curve_chart(
    curves: Curves,
    title: str,
    caption: str,
    series: Series,
    *,
    y: str = "nats",
    marked: bool = False,
    log: bool = False,
) -> Chart | None:
    """A line for each series over the steps of all stages; None where there is no series."""
    if not series:
        return None
    colours = _colours(curves, series)
    drawn = [Line(label=name, parts=_parts(parts), colour=colours[name]) for name, parts in series.items()]
    positive = all(y > 0 for parts in series.values() for part in parts for _, y in part)
    scale = "log" if log and positive else "linear"
    return Chart(
        title=title,
        caption=caption,
        drawing=lines(
            drawn, labels=(_STEPS, y), marked=marked, boundaries=_boundaries(curves), xlim=_whole(curves), yscale=scale
        ),
        header=("", "first", "last"),
        rows=tuple((name or y, *_ends(parts)) for name, parts in series.items()),
    )


def by_domain(curves: Curves, prefix: str, suffix: str) -> dict[str, tuple[Points, ...]]:
    """The series ``prefix`` domain ``suffix``, by domain."""
    return {name.removesuffix(suffix): parts for name, parts in curves.under(prefix).items() if name.endswith(suffix)}


def _named(series: Series) -> Series:
    return {_LOSSES.get(name, name): parts for name, parts in series.items()}


def _one(curves: Curves, name: str) -> Series:
    return {"": curves.series[name]} if name in curves.series else {}


def _shares(curves: Curves) -> Chart | None:
    realised = by_domain(curves, "train/shares/", "/realised")
    if not realised:
        return None
    colours = _colours(curves, realised)
    scheduled = by_domain(curves, "train/shares/", "/scheduled")
    drawn = [
        Line(label=f"{domain}{words}", parts=_parts(series[domain]), colour=colours[domain], style=style)
        for domain in realised
        for style, (series, words) in enumerate(((realised, ""), (scheduled, ", scheduled")))
        if domain in series
    ]
    return Chart(
        title="Domains' shares",
        caption="Of all sequences of the stage so far: what was drawn, and what the schedule asks for.",
        drawing=lines(
            drawn, labels=(_STEPS, "share"), boundaries=_boundaries(curves), xlim=_whole(curves), ylim=(-0.03, 1.03)
        ),
        header=("", "first", "last", "scheduled, last"),
        rows=tuple(
            (domain, *_ends(parts), _ends(scheduled[domain])[1] if domain in scheduled else "")
            for domain, parts in realised.items()
        ),
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
    domains = sorted({*by_domain(curves, "eval/domains/", "/ce"), *by_domain(curves, "train/shares/", "/realised")})
    return {name: domains.index(name) if name in domains else number for number, name in enumerate(names)}
