"""A run's folder flows in, the lines of each stage's ``metrics.jsonl`` flow out on one axis of optimizer steps.

Only what a report draws is read; lines of other kinds and further keys are passed over, and so is a last line that a
killed process left torn.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.cache import storage
from distill.errors import DataError

Points = tuple[tuple[float, float], ...]  # (optimizer step over all stages, value)
_STAGE = re.compile(r"stage(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage; its steps begin after ``start`` on the common axis."""

    name: str
    start: int
    num_steps: int
    first: dict[str, Any] | None  # its first and last evaluation, as written
    last: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """A run. A series is cut into one part for each stage, so that no line joins two stages."""

    stages: tuple[Stage, ...]
    series: dict[str, tuple[Points, ...]]  # "train/lr", "eval/medical/kl/1.0" … -> a part for each stage

    def under(self, prefix: str) -> dict[str, tuple[Points, ...]]:
        """The series below ``prefix``, without it."""
        return {name.removeprefix(prefix): parts for name, parts in self.series.items() if name.startswith(prefix)}


def stage_folders(run: Path) -> list[Path]:
    """The folders of a run, or of one stage of it, that hold a ``metrics.jsonl``, in order of stages."""
    if (run / "metrics.jsonl").is_file():
        return [run]
    numbered = [
        (int(match[1]), path.parent)
        for path in run.glob("stage*/metrics.jsonl")
        if (match := _STAGE.fullmatch(path.parent.name))
    ]
    return [folder for _, folder in sorted(numbered)]


def read_run(run: Path) -> Curves:
    """The curves of a run's folder, or of one stage's. Raises DataError when there are none."""
    series: dict[str, list[Points]] = {}
    stages: list[Stage] = []
    start = 0
    for index, folder in enumerate(stage_folders(run)):
        lines = _lines(folder / "metrics.jsonl")
        for name, points in _series(lines, start).items():
            parts = series.setdefault(name, [])
            parts.extend([()] * (index - len(parts)))
            parts.append(points)
        evaluations = [line for line in lines if line["kind"] == "eval"]
        num_steps = max((line["step"] for line in lines), default=0)
        first, last = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
        stages.append(Stage(name=folder.name, start=start, num_steps=num_steps, first=first, last=last))
        start += num_steps
    if not series:
        raise DataError(
            f"{run} holds no metrics of a run: no stage1 to stage3 with a metrics.jsonl that has a step in it. Name "
            "the folder given to `distill train --out`, or wait for its first step."
        )
    return Curves(stages=tuple(stages), series={name: tuple(parts) for name, parts in series.items()})


def _lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in records_of(path) if line.get("kind") in ("train", "eval", "sampling")]


def records_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects with a step among a file's lines; torn and other lines are passed over."""
    for text in storage.read(path).decode("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def _series(lines: list[dict[str, Any]], start: int) -> dict[str, Points]:
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in _leaves(line, f"{line['kind']}/"):
            points.setdefault(name, []).append((start + line["step"], value))
    return {name: tuple(values) for name, values in points.items()}


def _leaves(values: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    leaves: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            leaves += _leaves(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("step", "time"):
            leaves.append((f"{prefix}{key}", float(value)))
    return leaves
