"""What students learn from each kind of target: ``python -m benchmarks.students --data DIR [--table] [--json FILE]``.

A student of a few of the teacher's layers is trained on the same tokens, in the same steps, with the same seeds, on:
the renormalised top-k, top-k with a bucket, top-k with a low-rank tail (128 or 256 bytes; 256 beside a quarter of the
ids), ids drawn from the teacher (T=1), hard labels, and, as the limit, the teacher's full distribution, at T=4, 2, 1
and over the three stages of a curriculum. A target's share is what it closes of the gap in held-out KL between the
renormalised top-k and full distillation. Where that gap is within the noise of the seeds, a share means nothing and is
left out.

DIR has general.jsonl.gz and medical.jsonl.gz. Each finished run is a file under ``--out``: a rerun goes on from there.
"""

import argparse
import io
import itertools
import json
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

DOMAINS = ("general", "medical")
REFERENCES = ("renormalised", "full")
CACHED = ("bucket", "low_rank", "low_rank_256", "low_rank_256_few")
COLUMNS = {"renormalised": ("topk_ids", "topk_logprobs"), "bucket": ("topk_ids", "topk_logprobs", "log_z", "log_tail")}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by the number of seeds, 95%, two-sided


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all runs of a folder have in common."""

    teacher: str
    layers: int = 3
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 160
    stage_steps: int = 80  # of each stage of the curriculum
    batch_size: int = 4
    length: int = 128
    learning_rate: float = 5e-4  # at 1e-3 other rounding alone moves KL by .02, here by .0005 (80 steps)
    train_rows: int = 480  # of each domain
    eval_rows: int = 48
    measured_rows: int = 24  # of each domain's held-out ones
    least_characters: int = 300  # of a row's longest field, so that sequences are full
    top_k: int = 64
    few: int = 16  # ids beside the larger projection: fewer bytes in all
    num_samples: int = 50
    calibration_tokens: int = 9216
    precision: str = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run: a target in a setting ("T=4", "T=2", "T=1" or "curriculum")."""

    setting: str
    target: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}-{self.target}-seed{self.seed}".replace("=", "")


def grid(seeds: Sequence[int]) -> Iterator[Run]:
    """All runs: those with high temperatures first, seed by seed, and last what more bytes beside all ids are worth."""
    everywhere = ("renormalised", "full", "low_rank", "bucket", "low_rank_256_few")
    at_one = (*everywhere, "sampled", "ce")
    # At T=1, and where a curriculum ends, targets are nearer to each other than seeds: three show that.
    for settings, some in ((("T=2", "T=4"), seeds), (("T=1", "curriculum"), seeds[:3])):
        for seed in some:
            for setting in settings:
                targets = at_one if setting == "T=1" else everywhere
                yield from (Run(setting=setting, target=target, seed=seed) for target in targets)
    for setting in ("T=2", "T=4"):
        yield from (Run(setting=setting, target="low_rank_256", seed=seed) for seed in seeds)


def prepare(settings: Settings, data: Path, out: Path) -> Any:
    """The cache, the pruned student, and what runs share."""
    import torch

    from benchmarks.distillation import Lab
    from benchmarks.exact_teacher import make_cache, take_rows, write_rows
    from distill.config import CacheConfig, TargetsConfig
    from distill.student.precision import resolve_precision
    from distill.student.shrink import shrunken_student

    torch.set_num_threads(1)
    files: dict[str, dict[str, tuple[str, ...]]] = {"train": {}, "eval": {}}
    for split, num, skip in (("eval", settings.eval_rows, 0), ("train", settings.train_rows, settings.eval_rows)):
        for domain in DOMAINS:
            source = data / f"{domain}.jsonl.gz"
            rows = take_rows(source, num=num, skip=skip, least=settings.least_characters)
            files[split][domain] = (write_rows(out / "data" / f"{domain}-{split}.jsonl", rows),)
    config = CacheConfig(
        teacher=settings.teacher,
        data=files["train"],
        eval=files["eval"],
        out=str(out / "cache"),
        engine="transformers",
        dtype="float32",
        targets=TargetsConfig(top_k=settings.top_k),
        max_length=settings.length,
        unit_rows=50,
    )
    make_cache(config, hidden_bytes=(128, 256), calibration_tokens=settings.calibration_tokens)
    student = shrunken_student(settings.teacher, settings.layers, folder=out / "student", trust_remote_code=False)
    return Lab(
        out / "cache",
        student,
        batch_size=settings.batch_size,
        num_samples=settings.num_samples,
        few=settings.few,
        measured_rows=settings.measured_rows,
        precision=resolve_precision("cpu", settings.precision),
    )


def phases(setting: str, settings: Settings) -> list[Any]:
    """What a run trains on: one temperature and both domains, or the stages as they are by default but shorter.

    Of a stage's losses KL and cross-entropy are used, which the targets differ in.
    """
    from benchmarks.distillation import Phase
    from distill.config import ShareConfig, TrainConfig

    if setting != "curriculum":
        return [
            Phase(
                temperature=float(setting.removeprefix("T=")),
                kl_weight=1.0,
                ce_weight=0.0,
                shares={domain: ShareConfig() for domain in DOMAINS},
                learning_rate=settings.learning_rate,
                steps=settings.steps,
            )
        ]
    stages = [TrainConfig(cache="", student="", out="").stage(number) for number in (1, 2, 3)]
    return [
        Phase(
            temperature=stage.temperature,
            kl_weight=stage.weights.kl,
            ce_weight=stage.weights.ce,
            shares=stage.shares,
            learning_rate=settings.learning_rate * stage.learning_rate / stages[0].learning_rate,
            steps=settings.stage_steps,
        )
        for stage in stages
    ]


def run_grid(settings: Settings, data: Path, out: Path) -> None:
    """All runs that are missing in ``out``."""
    lab: Any = None
    for run in grid(settings.seeds):
        path = out / "runs" / f"{run.name}.json"
        if path.exists():
            continue
        lab = lab or prepare(settings, data, out)
        figures = lab.run(run.target, phases(run.setting, settings), seed=run.seed)
        aside = path.with_suffix(".new")
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({**asdict(run), **figures}), encoding="utf-8")
        aside.rename(path)
        print(run.name, figures, flush=True)


def bytes_per_token(cache: Path, settings: Settings) -> dict[str, float | None]:
    """What each target takes of a shard, compressed; larger projections in proportion, fewer ids written anew."""
    from distill.cache.reader import CacheReader
    from distill.cache.sizes import column_bytes

    reader = CacheReader.open(cache)
    num_targets = sum(commit.num_targets.total for commit in reader.commits)
    sizes, few = Counter[str](), Counter[str]()
    for commit in reader.commits:
        sizes.update(column_bytes(pq.read_metadata(cache / commit.shard)))
        few.update(column_bytes(pq.read_metadata(narrowed_shard(reader, commit, top_k=settings.few))))
    hidden = sum(size for name, size in sizes.items() if name.startswith("hidden_"))
    top, bucket = (sum(sizes[name] for name in COLUMNS[kind]) for kind in ("renormalised", "bucket"))
    found = {
        "renormalised": top,
        "bucket": bucket,
        "low_rank": bucket + hidden,
        "low_rank_256": bucket + 2 * hidden,
        "low_rank_256_few": sum(few[name] for name in COLUMNS["bucket"]) + 2 * hidden,
    }
    return {
        **{target: round(size / num_targets, 1) for target, size in found.items()},
        "sampled": round(sampled_bytes(cache, settings), 1),
        "ce": 0.0,
        "full": None,  # nothing is cached: the teacher runs beside the student
    }


def narrowed_shard(reader: Any, commit: Any, *, top_k: int) -> io.BytesIO:
    """A unit's shard as it would be with fewer ids; the tail's mass, which differs, takes as many bytes."""
    from distill.cache.shard import write_rows

    rows = []
    for row in itertools.chain(reader.sequences(commit, "train"), reader.sequences(commit, "eval")):
        ids, logprobs = row.targets.topk_ids[:, :top_k], row.targets.topk_logprobs[:, :top_k]
        rows.append(replace(row, targets=replace(row.targets, topk_ids=ids, topk_logprobs=logprobs)))
    file = io.BytesIO()
    write_rows(file, rows, replace(reader.layout, top_k=top_k))
    return file


def sampled_bytes(cache: Path, settings: Settings) -> float:
    """Compressed bytes for each target of the columns that keep drawn ids, on held-out rows."""
    import pyarrow as pa
    import torch

    from benchmarks.distillation import draw
    from benchmarks.exact_teacher import ExactTeacher

    exact = ExactTeacher.open(cache)
    states_ND = torch.from_numpy(np.concatenate(list(exact.states.values())[:16]))
    generator = torch.Generator().manual_seed(0)
    pairs = [draw(exact.logits(part), settings.num_samples, generator) for part in states_ND.split(128)]
    ids_J = torch.cat([ids for ids, _ in pairs]).int().numpy()
    counts_J = torch.cat([counts for _, counts in pairs]).short().numpy()
    file = io.BytesIO()
    pq.write_table(
        pa.table({"sampled_ids": ids_J, "sampled_counts": counts_J}),
        file,
        compression="zstd",
        use_dictionary=["sampled_counts"],
    )
    return len(file.getvalue()) / len(states_ND)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the 95% interval over seeds; None with one seed."""
    if len(values) < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), T_95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5


def compare(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each setting and KL that matters there: the gap, and the share of it that each target closes.

    What matters is the KL at the temperature trained at and at T=1. Gaps and shares are differences of runs with the
    same seed. ``defined`` says whether the gap's interval lies above 0.
    """
    by_run = {(run["setting"], run["target"], run["seed"]): run for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    compared = []
    for setting in dict.fromkeys(run["setting"] for run in runs):
        own = "1" if setting == "curriculum" else setting.removeprefix("T=")
        for metric in dict.fromkeys((f"kl_at_{own}", "kl_at_1")):
            value = {(target, seed): run[metric] for (at, target, seed), run in by_run.items() if at == setting}
            gaps = {
                seed: value["renormalised", seed] - value["full", seed]
                for seed in seeds
                if ("renormalised", seed) in value and ("full", seed) in value
            }
            if not gaps:
                continue
            gap, half = interval(list(gaps.values()))
            entry = {"setting": setting, "metric": metric, "seeds": len(gaps), "gap": gap, "gap_half_interval": half}
            entry["defined"] = half is not None and gap - half > 0
            entry["shares"] = {}
            for target in dict.fromkeys(target for target, _ in value if target not in REFERENCES):
                shares = [
                    (value["renormalised", s] - value[target, s]) / gaps[s]
                    for s in gaps
                    if (target, s) in value and gaps[s]
                ]
                if shares:
                    mean, half = interval(shares)
                    entry["shares"][target] = {"mean": mean, "half_interval": half}
            compared.append(entry)
    return compared


def report(settings: Settings, out: Path, *, command: str) -> dict[str, Any]:
    """All figures of the runs that are there."""
    runs = [
        json.loads(path.read_text())
        for run in grid(settings.seeds)
        if (path := out / "runs" / f"{run.name}.json").exists()
    ]
    compared = compare(runs)
    worst: dict[str, float | None] = {}
    for target in (*CACHED, "sampled", "ce"):
        means = [
            entry["shares"][target]["mean"] for entry in compared if entry["defined"] and target in entry["shares"]
        ]
        worst[target] = round(min(means), 4) if means else None
    return {
        "worst_gap_closed": worst,
        "compared": compared,
        "bytes_per_token": bytes_per_token(out / "cache", settings),
        "finished_runs": len(runs),
        "planned_runs": len(list(grid(settings.seeds))),
        "settings": {**asdict(settings), "teacher": Path(settings.teacher).name},
        "command": command,
        "machine": machine(),
        "runs": runs,
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_tables(figures: dict[str, Any]) -> None:
    """The figures for people."""
    title = f"{figures['finished_runs']} of {figures['planned_runs']} runs; held-out figures, mean over seeds"
    table = Table("setting", "target", "B/token", "KL T=4", "KL T=2", "KL T=1", "CE", "top-1", "seeds", title=title)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in figures["runs"]:
        groups.setdefault((run["setting"], run["target"]), []).append(run)
    for (setting, target), runs in groups.items():
        size = figures["bytes_per_token"][target]
        means = [np.mean([run[key] for run in runs]) for key in ("kl_at_4", "kl_at_2", "kl_at_1", "ce", "top1")]
        texts = ["online" if size is None else f"{size:g}", *(f"{mean:.4f}" for mean in means), str(len(runs))]
        table.add_row(setting, target, *texts)
    shares = Table("setting", "by", "gap", *(*CACHED, "sampled", "ce"), title="share of the gap that is closed")
    for entry in figures["compared"]:
        cells = []
        for target in (*CACHED, "sampled", "ce"):
            share = entry["shares"].get(target)
            cells.append("" if share is None else _with_interval(share["mean"], share["half_interval"], digits=3))
        gap = _with_interval(entry["gap"], entry["gap_half_interval"], digits=4)
        shares.add_row(
            entry["setting"], entry["metric"], gap, *(cells if entry["defined"] else ["undefined"] * len(cells))
        )
    console = Console(width=140)
    console.print(table)
    console.print(shares)
    console.print("worst share where defined:", figures["worst_gap_closed"])


def _with_interval(mean: float, half: float | None, *, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Those of the folder, which were written when it was begun; the arguments' for a new one."""
    path = arguments.out / "settings.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Settings(**{**kept, "seeds": tuple(kept["seeds"])})
    if arguments.teacher is None:
        from examples.smollm2 import teacher_folder

        arguments.teacher = teacher_folder()
    changed = {name: json.loads(value) for name, value in (text.split("=", 1) for text in arguments.set)}
    if "seeds" in changed:
        changed["seeds"] = tuple(changed["seeds"])
    settings = Settings(teacher=str(arguments.teacher), **changed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(settings), indent=2), encoding="utf-8")
    return settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print tables, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.students", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with general.jsonl.gz and medical.jsonl.gz")
    parser.add_argument("--teacher", type=Path, help="model folder; default: SmolLM2-135M-Instruct of the demo")
    parser.add_argument("--out", type=Path, default=Path("runs/students"), help="where runs are kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="a setting of a new folder")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parsed = parser.parse_args(arguments)
    if not parsed.table and parsed.data is None:
        parser.error("--data is missing")
    settings = settings_of(parsed)
    if not parsed.table:
        run_grid(settings, parsed.data, parsed.out)
    # Where data and runs lie on this machine is of no use to anybody.
    figures = report(settings, parsed.out, command="python -m benchmarks.students --data DIR --out DIR --json FILE")
    print_tables(figures)
    if parsed.json:
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        parsed.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
