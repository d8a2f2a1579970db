"""Steps and evaluations flow in, lines of ``metrics.jsonl`` flow out, and points of wandb where it is asked for."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distill.config import TrainConfig
from distill.errors import UsageError


class Metrics:
    """Appends to a stage's ``metrics.jsonl``; a context manager.

    Lines after ``step``, which a killed process wrote and a resumed one writes again, are dropped.
    """

    def __init__(self, folder: Path, *, step: int, config: TrainConfig, number: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = _lines_up_to(path, step)
        aside = path.with_name(".metrics.jsonl.new")
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        aside.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._wandb = _wandb_run(folder, config, number) if config.wandb else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line with ``kind`` and ``step`` in front."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(_flat(values, f"{kind}/"), step=step)


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Whole lines of at most ``step``; the last line of a killed process may be torn."""
    if not path.exists() or step == 0:
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _wandb_run(folder: Path, config: TrainConfig, number: int) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UsageError("wandb is not installed. Install distill[wandb], or leave --wandb away.") from error
    return wandb.init(
        project="distill",
        name=f"{Path(config.out).name}-stage{number}",
        group=Path(config.out).name,
        dir=str(folder),
        config=config.model_dump(mode="json"),
    )


def _flat(values: dict[str, Any], prefix: str) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = value
    return flat
