"""``--worker`` and a scheduler's environment flow in, which of how many workers this process is flows out.

Workers share no state but the cache's folder. A worker's place only says which units it takes first, so a wrong one
costs time and never a row.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from distill.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Worker ``index``, from 0, of ``count``."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def find_worker(option: str | None, environment: Mapping[str, str]) -> Worker:
    """The worker that ``option`` names ("3/8"), else the scheduler's variables, else the only one.

    Raises UsageError for anything that is not a place among workers.
    """
    if option is not None:
        return _from_option(option)
    for found in (_from_slurm(environment), _from_kubernetes(environment), _from_skypilot(environment)):
        if found is not None:
            return found
    return Worker()


def _from_option(text: str) -> Worker:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise UsageError(
            f"--worker takes INDEX/COUNT, for example 0/4 for the first of four workers and 3/4 for the last, got "
            f"'{text}'."
        )
    return _placed(int(match[1]), int(match[2]), "--worker")


def _from_slurm(environment: Mapping[str, str]) -> Worker | None:
    """Of a job array. Indices may start anywhere and step: ``--array=10-40:10`` is four workers."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    first = _number(environment, "SLURM_ARRAY_TASK_MIN")
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") if environment.get("SLURM_ARRAY_TASK_STEP") else 1
    index = (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // max(step, 1)
    return _placed(index, _number(environment, "SLURM_ARRAY_TASK_COUNT"), "SLURM_ARRAY_TASK_ID, …_MIN and …_COUNT")


def _from_kubernetes(environment: Mapping[str, str]) -> Worker | None:
    """Of an Indexed Job. Kubernetes tells a pod its index only; the job's template has to pass the count on."""
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    index, count = _number(environment, "JOB_COMPLETION_INDEX"), _number(environment, "JOB_COMPLETIONS")
    return _placed(index, count, "JOB_COMPLETION_INDEX and JOB_COMPLETIONS")


def _from_skypilot(environment: Mapping[str, str]) -> Worker | None:
    if "SKYPILOT_NODE_RANK" not in environment:
        return None
    index, count = _number(environment, "SKYPILOT_NODE_RANK"), _number(environment, "SKYPILOT_NUM_NODES")
    return _placed(index, count, "SKYPILOT_NODE_RANK and SKYPILOT_NUM_NODES")


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"[0-9]+", text):
        state = f"is '{text}'" if text else "is not set"
        raise UsageError(
            f"This runs under a scheduler, but {name} {state}, so it cannot be told which worker of how many this is. "
            "Set it in the job's description to a whole number (see docs/many-machines.md), or pass --worker "
            "INDEX/COUNT."
        )
    return int(text)


def _placed(index: int, count: int, origin: str) -> Worker:
    if not 0 <= index < count:
        raise UsageError(
            f"{origin}: there is no worker {index} of {count}. Workers count from 0, so the last of {count} is "
            f"{max(count - 1, 0)}/{count}; pass --worker INDEX/COUNT where a scheduler's numbers have gaps."
        )
    return Worker(index=index, count=count)
