"""A stage's folder flows in, what it came to flows out; and its resolved configuration goes into ``config.yaml``."""

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from distill import __version__
from distill.cache import storage
from distill.cache.reader import CacheReader
from distill.config import TrainConfig
from distill.student.checkpoint import read_state
from distill.student.figures import Evaluation
from distill.student.stage import StagePlan

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """A finished stage. ``evaluation`` is that of the best step; None without held-out rows."""

    stage: int
    folder: Path
    best: Path
    num_steps: int
    best_step: int
    objective: float | None  # held-out weighted loss of the best step
    evaluation: Evaluation | None
    already_finished: bool  # nothing was left to do
    notes: tuple[str, ...]

    @staticmethod
    def read(folder: Path, *, already_finished: bool, notes: Sequence[str]) -> "StageResult":
        """The result that ``last/`` and ``best/`` of a finished stage tell."""
        last, best = read_state(folder / "last"), read_state(folder / "best")
        return StageResult(
            stage=last.stage,
            folder=folder,
            best=folder / "best",
            num_steps=last.step,
            best_step=best.step,
            objective=last.best.objective if last.best else None,
            evaluation=best.evaluation,
            already_finished=already_finished,
            notes=tuple(notes),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "folder": str(self.folder), "best": str(self.best), "notes": list(self.notes)}


def write_config(folder: Path, config: TrainConfig, *, plan: StagePlan, reader: CacheReader, start: str) -> None:
    """``config.yaml``: everything that the stage was made of, for people.

    Where it goes on with other versions than it began with, ``earlier_versions`` keeps those.
    """
    versions = {
        "distill": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    path = folder / "config.yaml"
    content = {
        "versions": versions,
        "earlier_versions": [one for one in _versions_in(path) if one != versions],
        "train": config.model_dump(mode="json"),
        "stage": {"number": plan.number, "start": start, "steps": plan.num_steps, **plan.stage.model_dump(mode="json")},
        "cache_identity": reader.identity.model_dump(mode="json"),
    }
    data = yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()
    storage.write(path, lambda file: file.write(data), need=len(data))


def _versions_in(path: Path) -> list[dict[str, str]]:
    """All that an earlier ``config.yaml`` names; people may have changed the file."""
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [*before["earlier_versions"], before["versions"]]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return []
