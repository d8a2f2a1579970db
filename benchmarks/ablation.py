"""What each part of a stage is good for: ``python -m benchmarks.ablation --data DIR [--table] [--json FILE]``.

Stage 2 of a small student on real text, with everything on and with one part off at a time: the feature loss, its inner
layers alone, the attention and contrastive losses, gradient balancing, evaluation-driven sampling, the schedule of the
domains' shares. Two seeds each.
Held-out figures against the cache; what counts is their difference to everything on, beside that between seeds.

DIR has general.jsonl.gz and medical.jsonl.gz. Finished runs are kept under ``--out``: a rerun goes on from there.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.students import DOMAINS, machine

OFF: dict[str, dict[str, Any]] = {
    "nothing": {},
    "feature": {"weights": {"feature": 0.0}},
    "inner layers": {"feature": {"layers": "none"}},
    "attention": {"weights": {"attention": 0.0}},
    "contrastive": {"weights": {"contrastive": 0.0}},
    "balancing": {"balance": False},
    "sampling": {"sampling": "uniform"},
    "schedule": {"shares": dict.fromkeys(DOMAINS, 0.5)},
}
FIGURES = ("kl_at_2", "kl_at_1", "ce", "top1")
SETTINGS: dict[str, Any] = {
    "rows": 96,
    "eval_rows": 16,
    "length": 96,
    "least_characters": 300,
    "layers": 3,
    "heads": {"14": [0, 4], "29": [0, 4]},
    "inner": [15],
    "inner_bytes": 64,
    "top_k": 64,
    "hidden_bytes": 128,
    "steps": 40,
    "evaluations": 4,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "precision": "bf16",
    "seeds": [0, 1],
}


def make_parts(teacher: str, data: Path, out: Path, settings: dict[str, Any]) -> None:
    """The cache, with heads, and the pruned student."""
    from benchmarks.exact_teacher import take_rows, write_rows
    from distill.config import CacheConfig, TargetsConfig
    from distill.student.shrink import shrunken_student
    from distill.teacher.job import cache_teacher

    files: dict[str, dict[str, tuple[str, ...]]] = {"train": {}, "eval": {}}
    for split, num, skip in (("eval", settings["eval_rows"], 0), ("train", settings["rows"], settings["eval_rows"])):
        for domain in DOMAINS:
            source = data / f"{domain}.jsonl.gz"
            rows = take_rows(source, num=num, skip=skip, least=settings["least_characters"])
            files[split][domain] = (write_rows(out / "data" / f"{domain}-{split}.jsonl", rows),)
    config = CacheConfig(
        teacher=teacher,
        data=files["train"],
        eval=files["eval"],
        out=str(out / "cache"),
        engine="transformers",
        targets=TargetsConfig(
            top_k=settings["top_k"],
            hidden_bytes=settings["hidden_bytes"],
            layers=tuple(settings["inner"]),
            layer_bytes=settings["inner_bytes"],
            heads={int(layer): tuple(heads) for layer, heads in settings["heads"].items()},
        ),
        max_length=settings["length"],
        unit_rows=32,
    )
    cache_teacher(config)
    shrunken_student(teacher, settings["layers"], folder=out / "student", trust_remote_code=False)


def run(out: Path, off: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Stage 2 with one part off; held-out figures at its end."""
    from distill.config import TrainConfig
    from distill.student.trainer import train_stage

    stage: dict[str, Any] = {
        "weights": {"feature": 0.2, "attention": 0.2, "contrastive": 0.1},
        "balance": True,
        "balance_every": 10,
        "sampling": "evaluation",
        "max_steps": settings["steps"],
        "eval_every": max(1, settings["steps"] // settings["evaluations"]),
        "batch_size": settings["batch_size"],
        "learning_rate": settings["learning_rate"],
    }
    changes = OFF[off]
    weights = {**stage["weights"], **changes.get("weights", {})}
    config = TrainConfig(
        cache=str(out / "cache"),
        student=str(out / "student"),
        out=str(out / "runs" / f"without-{off}-seed{seed}"),
        tune="full",
        device="cpu",
        precision=settings["precision"],
        head_chunk=128,
        seed=seed,
        stages={2: {**stage, **changes, "weights": weights}},
    )
    result = train_stage(config, 2, start=out / "student", quiet=True)
    assert result.evaluation is not None, "there are held-out rows"
    overall = result.evaluation.overall
    figures = {"kl_at_2": overall.kl[2.0], "kl_at_1": overall.kl[1.0], "ce": overall.ce, "top1": overall.top1_agreement}
    return {"off": off, "seed": seed, **{name: round(value, 5) for name, value in figures.items()}}


def run_all(teacher: str, data: Path, out: Path, settings: dict[str, Any]) -> None:
    """All runs that are missing in ``out``."""
    import torch

    torch.set_num_threads(1)
    for seed in settings["seeds"]:
        for off in OFF:
            path = out / f"without-{off}-seed{seed}.json"
            if not path.exists():
                make_parts(teacher, data, out, settings)
                path.write_text(json.dumps(run(out, off, seed, settings)), encoding="utf-8")
                print(path.stem, flush=True)


def report(out: Path, settings: dict[str, Any], *, command: str) -> dict[str, Any]:
    """Each part's effect: the mean over seeds of the figures without it less those with everything on."""
    paths = [out / f"without-{off}-seed{seed}.json" for off in OFF for seed in settings["seeds"]]
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    by_run = {(item["off"], item["seed"]): item for item in runs}
    effects = {}
    for off in OFF:
        seeds = [seed for seed in settings["seeds"] if (off, seed) in by_run and ("nothing", seed) in by_run]
        if off != "nothing" and seeds:
            effects[off] = {
                name: [round(by_run[off, seed][name] - by_run["nothing", seed][name], 5) for seed in seeds]
                for name in FIGURES
            }
    return {"without": effects, "runs": runs, "settings": settings, "command": command, "machine": machine()}


def print_table(figures: dict[str, Any]) -> None:
    """Effects for people: the mean over seeds, and each seed's."""
    table = Table("without", *FIGURES, title="difference to everything on: mean (each seed)")
    for off, effects in figures["without"].items():
        cells = [f"{np.mean(v):+.4f} ({', '.join(f'{value:+.4f}' for value in v)})" for v in effects.values()]
        table.add_row(off, *cells)
    Console(width=150).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with general.jsonl.gz and medical.jsonl.gz")
    parser.add_argument("--teacher", type=Path, help="model folder; default: SmolLM2-135M-Instruct of the demo")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="where runs are kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="another setting")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parsed = parser.parse_args(arguments)
    if not parsed.table and parsed.data is None:
        parser.error("--data is missing")
    changed = {name: json.loads(value) for name, value in (text.split("=", 1) for text in parsed.set)}
    settings = {**SETTINGS, **changed}
    if not parsed.table:
        if parsed.teacher is None:
            from examples.smollm2 import teacher_folder

            parsed.teacher = teacher_folder()
        run_all(str(parsed.teacher), parsed.data, parsed.out, settings)
    command = shlex.join(["python", "-m", "benchmarks.ablation", *(arguments or sys.argv[1:])])
    figures = report(parsed.out, settings, command=command)
    print_table(figures)
    if parsed.json:
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        parsed.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
