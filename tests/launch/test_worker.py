"""Which worker a process is: the option first, then each scheduler's variables; half of them are never guessed from."""

import pytest

from distill.errors import UsageError
from distill.launch.worker import Worker, find_worker

SLURM = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "3"}
SKYPILOT = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "2"}


def place(option: str | None, environment: dict[str, str]) -> tuple[int, int]:
    worker = find_worker(option, environment)
    return worker.index, worker.count


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        (SLURM, (2, 4)),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "23", "SLURM_ARRAY_TASK_STEP": "10"}, (2, 4)),
        (KUBERNETES, (2, 3)),
        (SKYPILOT, (0, 2)),
        ({**SKYPILOT, **SLURM}, (2, 4)),
    ],
)
def test_schedulers(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert place(None, environment) == expected


def test_the_option_wins() -> None:
    assert place("1/7", SLURM | KUBERNETES) == (1, 7)
    assert place("0/1", {"SLURM_ARRAY_TASK_ID": "nonsense"}) == (0, 1)
    assert str(find_worker("1/7", {})) == "1/7"
    assert find_worker(None, {}) == Worker()


@pytest.mark.parametrize("option", ["", "1", "1/", "/2", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "1.0/2", " 0/2"])
def test_wrong_options(option: str) -> None:
    with pytest.raises(UsageError, match="--worker"):
        find_worker(option, {})


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN is not set"),
        ({**SLURM, "SLURM_ARRAY_TASK_COUNT": "many"}, "SLURM_ARRAY_TASK_COUNT is 'many'"),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "9"}, "no worker 6 of 4"),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "2"}, "no worker -1 of 4"),
        ({"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETIONS is not set"),
        ({**KUBERNETES, "JOB_COMPLETIONS": "2"}, "no worker 2 of 2"),
        ({"SKYPILOT_NODE_RANK": "0"}, "SKYPILOT_NUM_NODES is not set"),
        ({**SKYPILOT, "SKYPILOT_NUM_NODES": "-2"}, "SKYPILOT_NUM_NODES is '-2'"),
    ],
)
def test_half_told_or_impossible_places(environment: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        find_worker(None, environment)
