"""A run flows in, the page about it flows out: losses, schedules, how close each stage came, what its student says."""

from pathlib import Path
from typing import Any

from distill import __version__
from distill.report.answers import answers_table
from distill.report.curves import Curves, read_run
from distill.report.held_out import held_out_charts, held_out_table
from distill.report.page import Page
from distill.report.run_charts import training_charts
from distill.report.tokens import run_views

_MOST_DOMAINS = 3  # whose progress stands at the top


def run_page(path: Path) -> Page:
    """The page of the run, or of the one stage, at ``path``.

    Raises DataError when it holds no metrics, CorruptionError when a ``tokens.json`` is damaged.
    """
    curves = read_run(path)
    names = ", ".join(stage.name for stage in curves.stages)
    return Page(
        title=f"Run {path.resolve().name}",
        subtitle=f"{path} · {names}",
        facts=_facts(curves),
        summary=held_out_table(curves),
        groups=(
            ("Held out, over the steps", tuple(held_out_charts(curves))),
            ("Training, over the steps", tuple(training_charts(curves))),
        ),
        views=run_views(path),
        tables=(answers_table(path),),
        foot=f"Made by distill {__version__}. Dotted lines part the stages; steps are counted on over them.",
    )


def _facts(curves: Curves) -> tuple[tuple[str, str], ...]:
    """How far each domain came, and what it took."""
    facts = []
    for domain, (first, last) in list(_ends(curves).items())[:_MOST_DOMAINS]:
        kl = [figures["kl"].get("1.0") for figures in (first, last)]
        if None not in kl:
            facts.append((f"{kl[0]:.2f} → {kl[1]:.2f}", f"KL to the teacher at T=1, held out, {domain}"))
        agreed = " → ".join(f"{figures['top1_agreement']:.0%}" for figures in (first, last))
        facts.append((agreed, f"first choices that are the teacher's, {domain}"))
    steps = " + ".join(f"{stage.num_steps:,}" for stage in curves.stages)
    facts.append((steps, f"optimizer steps of {', '.join(stage.name for stage in curves.stages)}"))
    tokens = sum(value for part in curves.series.get("train/tokens", ()) for _, value in part)
    return (*facts, (f"{tokens:,.0f}", "tokens trained on"))


def _ends(curves: Curves) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The first and the last figures of each domain, whichever stages measured it."""
    ends: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for stage in curves.stages:
        for evaluation in (stage.first, stage.last):
            for domain, figures in (evaluation or {"domains": {}})["domains"].items():
                ends[domain] = (ends.get(domain, (figures,))[0], figures)
    return ends
