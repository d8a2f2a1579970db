"""A student and names of lm-eval tasks flow in, lm-eval's figures flow out. Needs the extra ``lm-eval``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UsageError
from distill.student.model import Student


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFigures:
    """One task or group of tasks: "acc" -> value, and "acc" -> its standard error where lm-eval has one."""

    task: str
    values: dict[str, float]
    errors: dict[str, float]


def require_lm_eval() -> None:
    """Raise UsageError where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--lm-eval needs the package lm-eval, which is not installed. Install distill[lm-eval], or leave --lm-eval "
            "away; --choices measures on multiple-choice files of your own without it."
        ) from error


def run_tasks(
    student: Student,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[TaskFigures]:
    """lm-eval's figures of ``tasks``; its own, and those of the YAML files in ``folder``, which come first.

    The student stays as it is loaded, adapter included. Prompts are the tasks' own, without the chat template, as
    published figures have them. ``limit`` takes the first questions of each task. Raises UsageError when lm-eval is not
    installed, knows no such task, or cannot get its data.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    student.model.eval()
    manager = _manager_of(tasks, folder)
    model = HFLM(pretrained=student.model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    try:
        found = simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"lm-eval cannot run {', '.join(tasks)}: {reason}. Check that the tasks' data can be had (HF_HUB_OFFLINE "
            "allows only what the cache holds), and the YAML files of your own tasks."
        ) from error
    return [_figures(task, values) for task, values in found["results"].items()]


def _manager_of(tasks: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's index of tasks. Its own tasks are thousands of files, which are read only where one is asked for."""
    from lm_eval.tasks import TaskManager

    where = None if folder is None else str(folder)
    if where is not None:
        own = TaskManager(include_path=where, include_defaults=False)
        if not _unknown(tasks, own):
            return own
    everything = TaskManager(include_path=where)
    unknown = _unknown(tasks, everything)
    if unknown:
        raise UsageError(
            f"lm-eval knows no task {' and no '.join(unknown)}. `lm-eval ls tasks` lists its own; your own are YAML "
            "files in the folder of --lm-eval-tasks."
        )
    return everything


def _unknown(tasks: Sequence[str], manager: Any) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


def _figures(task: str, values: dict[str, Any]) -> TaskFigures:
    """``values`` has keys such as "acc,none" and "acc_stderr,none": metric and filter."""
    numbers = {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key
    }
    errors = {key.replace("_stderr", ""): value for key, value in numbers.items() if "_stderr" in key}
    return TaskFigures(
        task=task, values={key: value for key, value in numbers.items() if "_stderr" not in key}, errors=errors
    )
