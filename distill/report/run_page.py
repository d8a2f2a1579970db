"""A run flows in, the page about it flows out: losses, schedules, how close each stage came, what its student says."""

from pathlib import Path

from distill import __version__
from distill.report.answers import answers_table
from distill.report.curves import Curves, read_run
from distill.report.held_out import held_out_charts, held_out_table
from distill.report.page import Page
from distill.report.run_charts import training_charts
from distill.report.tokens import run_views


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
        charts=(*training_charts(curves), *held_out_charts(curves)),
        views=run_views(path),
        tables=(held_out_table(curves), answers_table(path)),
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
