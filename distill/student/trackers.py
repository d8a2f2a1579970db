"""A stage's numbers and answers flow in, points and tables of wandb and TensorBoard flow out, where they are asked for.

Both work without a network: wandb with WANDB_MODE=offline, TensorBoard always.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import yaml

from distill.config import TrainConfig
from distill.errors import UsageError
from distill.student.samples import Answer

_WANDB_ID = "wandb.id"  # of the stage's run, so that a resumed stage goes on with it


class Tracker(Protocol):
    """Where numbers are sent beside ``metrics.jsonl``."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""

    def answers(self, answers: Sequence[Answer], step: int) -> None:
        """A student's answers at a step."""

    def close(self, *, failed: bool) -> None:
        """The stage ended."""


def refuse_missing(config: TrainConfig) -> None:
    """Raise UsageError where a tracker is asked for that is not installed."""
    if config.wandb:
        _wandb()
    if config.tensorboard:
        _summary_writer()


def trackers_of(config: TrainConfig, folder: Path, *, number: int, step: int) -> list[Tracker]:
    """Trackers of stage ``number``, which begins or goes on after ``step``."""
    trackers: list[Tracker] = []
    if config.wandb:
        trackers.append(WandbTracker(config, folder, number=number, step=step))
    if config.tensorboard:
        trackers.append(TensorboardTracker(folder, step=step))
    return trackers


class WandbTracker:
    """A run of wandb for each stage, grouped by the run's folder, with all of ``config.yaml`` as its configuration."""

    def __init__(self, config: TrainConfig, folder: Path, *, number: int, step: int) -> None:
        self._wandb = _wandb()
        name = Path(config.out).name
        self._run = self._wandb.init(
            project="distill",
            name=f"{name}-stage{number}",
            group=name,
            dir=str(folder),
            id=_wandb_id(folder, step),
            resume="allow",
            config=_about(folder),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        self._run.log(dict(values), step=step)

    def answers(self, answers: Sequence[Answer], step: int) -> None:
        """One table for each evaluation."""
        rows = [asdict(answer) for answer in answers]
        table = self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({"samples": table}, step=step)

    def close(self, *, failed: bool) -> None:
        """Flush, and say how it ended."""
        self._run.finish(exit_code=1 if failed else 0)


class TensorboardTracker:
    """Event files in the stage's folder ``tensorboard/``. Points after ``step`` of a killed process are hidden."""

    def __init__(self, folder: Path, *, step: int) -> None:
        self._writer = _summary_writer()(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if step == 0:
            self._writer.add_text("config", f"```yaml\n{yaml.safe_dump(_about(folder), sort_keys=False)}```", 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def answers(self, answers: Sequence[Answer], step: int) -> None:
        """One text for each question, as Markdown."""
        for number, answer in enumerate(answers, 1):
            parts = {"prompt": answer.prompt, "student": answer.student, answer.author: answer.reference}
            text = "\n\n".join(f"**{name}**: {words}" for name, words in parts.items())
            self._writer.add_text(f"samples/{answer.domain}/{number}", text, step)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002 - TensorBoard knows no end
        """Flush."""
        self._writer.close()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UsageError("wandb is not installed. Install distill[wandb], or leave --wandb away.") from error
    return wandb


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "tensorboard is not installed. Install distill[tensorboard], or leave train.tensorboard away."
        ) from error
    return SummaryWriter


def _about(folder: Path) -> dict[str, Any]:
    """What the stage is made of: its configuration, package versions and the cache's identity, as ``config.yaml``."""
    about: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return about


def _wandb_id(folder: Path, step: int) -> str:
    path = folder / _WANDB_ID
    if step == 0 or not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
