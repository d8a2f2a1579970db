"""The whole job on a real small teacher: cache it, verify, train three stages, and show what came of it.

    python -m examples.demo        # or: make demo

Every step is the command that a user would type, and recognises its own finished work: a second run only evaluates.
Exits with 1 when the distilled student is no closer to the teacher than the pruned one it began as.
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.smollm2 import teacher_folder

ROOT = Path(__file__).parent.parent
CONFIG = "examples/demo.yaml"
CACHE, RUN = Path("runs/demo/cache"), Path("runs/demo")
NAMES = ("pruned", "stage 1", "stage 2", "stage 3")


def distill(*arguments: str) -> dict[str, Any]:
    """Runs ``distill … --json`` from the repository's root, shows the command, returns what it printed."""
    command = ["distill", *arguments]
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", *command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def evaluate(student: str) -> list[dict[str, Any]]:
    """Held-out figures of the pruned student and of each stage's best checkpoint."""
    from distill.config import TrainConfig, read_section, validated
    from distill.student.evaluate import evaluate_model

    values = read_section(ROOT / CONFIG, "train") | {"student": student, "cache": str(ROOT / CACHE)}
    config = validated(TrainConfig, values, origin=CONFIG)
    models = [RUN / "student", *(RUN / f"stage{number}" / "best" for number in (1, 2, 3))]
    return [asdict(evaluate_model(config, ROOT / model)) for model in models]


def show(cached: dict[str, Any], inspected: dict[str, Any], evaluations: list[dict[str, Any]]) -> None:
    """The closing tables."""
    console = Console()
    table = Table(title="Held-out distance to the teacher, nats per trained token")
    for name in ("after", "domain", "KL T=4", "KL T=2", "KL T=1", "CE", "top-1"):
        table.add_column(name, justify="left" if name in ("after", "domain") else "right")
    for name, evaluation in zip(NAMES, evaluations, strict=True):
        for domain, figures in {**evaluation["domains"], "both": evaluation["overall"]}.items():
            numbers = [figures["kl"][temperature] for temperature in (4.0, 2.0, 1.0)]
            row = [f"{number:.3f}" for number in (*numbers, figures["ce"])]
            table.add_row(name, domain, *row, f"{figures['top1_agreement']:.1%}", end_section=domain == "both")
    console.print(table)
    rate = cached.get("tokens_per_s")
    console.print(f"Cache: {sum(inspected['bytes_per_token'].values()):.0f} bytes per token on disk", end="")
    console.print(f", captured at {rate:,.0f} tokens/s." if rate else ", captured by an earlier run.")


def main() -> None:
    """Runs the demo."""
    started = time.monotonic()
    teacher = str(teacher_folder())
    cached = distill("cache-teacher", "--config", CONFIG, "--teacher", teacher)
    distill("verify", str(CACHE))
    inspected = distill("inspect", str(CACHE))
    distill("train", "--stage", "1-3", "--config", CONFIG, "--student", teacher)
    evaluations = evaluate(teacher)
    show(cached, inspected, evaluations)
    before, after = (evaluations[index]["overall"]["kl"][1.0] for index in (0, 3))
    print(f"Held-out KL at T=1 over both domains: {before:.3f} before stage 1, {after:.3f} after stage 3.")
    print(f"Look into it: distill inspect {CACHE} --row 7. All of it took {time.monotonic() - started:.0f} s.")
    if not after < before:
        raise SystemExit("The student is no closer to the teacher than before: something is wrong.")


if __name__ == "__main__":
    main()
