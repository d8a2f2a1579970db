"""Steps, evaluations and answers flow in; ``metrics.jsonl``, ``samples.jsonl`` and points of trackers flow out."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distill.config import TrainConfig
from distill.errors import StorageError
from distill.student.samples import Answer
from distill.student.trackers import trackers_of


class Metrics:
    """Appends to a stage's ``metrics.jsonl`` and ``samples.jsonl``; a context manager.

    Lines after ``step``, which a killed process wrote and a resumed one writes again, are dropped. Raises StorageError
    when the disk refuses a line.
    """

    def __init__(self, folder: Path, *, step: int, config: TrainConfig, number: int) -> None:
        self._trackers = trackers_of(config, folder, number=number, step=step)
        self._lines = _Lines(folder / "metrics.jsonl", step=step)
        self._samples = _Lines(folder / "samples.jsonl", step=step) if config.samples else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        if self._samples is not None:
            self._samples.close()
        for tracker in self._trackers:
            tracker.close(failed=error is not None)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line with ``kind`` and ``step`` in front."""
        self._lines.append({"kind": kind, "step": step, **values})
        for tracker in self._trackers:
            tracker.log(_flat(values, f"{kind}/"), step)

    def log_answers(self, step: int, answers: Sequence[Answer]) -> None:
        """One line for each answer."""
        if self._samples is None or not answers:
            return
        for answer in answers:
            self._samples.append({"step": step, **asdict(answer)})
        for tracker in self._trackers:
            tracker.answers(answers, step)


class _Lines:
    """A file of JSON lines, each with its step, without those after ``step``."""

    def __init__(self, path: Path, *, step: int) -> None:
        self._path = path
        with self._storage_errors():
            kept = _lines_up_to(path, step)
            aside = path.with_name(f".{path.name}.new")
            aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            aside.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def append(self, values: dict[str, Any]) -> None:
        with self._storage_errors():
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that was refused before
            self._file.close()

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot write {self._path}: {error}. Checkpoints are whole. Free space or correct the rights, then "
                "run the same command again to go on."
            ) from error


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


def _flat(values: dict[str, Any], prefix: str) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = value
    return flat
