"""Model families in the real vLLM: tied and untied heads, biases, soft-capped and scaled logits, experts, padded heads.

What it protects: that capture applies exactly what the model's own forward pass applies between hidden state and
probability. Tiny random weights; every model has twelve more head rows than tokens.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.teacher.families import FAMILIES, save_tiny

pytest.importorskip("vllm", exc_type=ImportError)

MODES = ("Qwen3@tight", "Qwen3@compiled")  # see tests.teacher.capture_models
# In vLLM's second model runner, which alone has pipeline stages on a CPU; each stage needs a core of its own.
SECOND = ("Qwen3", "Qwen3@tight")
CORES = sorted(os.sched_getaffinity(0))
STAGES = ("Qwen3@pp",) if len(CORES) > 1 else ()
RUNS = [*FAMILIES, *MODES, *(f"{name} v2" for name in SECOND + STAGES)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Largest errors of each family; all of them are captured in one process."""
    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        save_tiny(name, root / name)
    return {
        **captured(*(str(root / name) for name in (*FAMILIES, *MODES))),
        **second(*(str(root / name) for name in SECOND)),
        **(second(*(str(root / name) for name in STAGES), bind="|".join(map(str, CORES[:2]))) if STAGES else {}),
    }


def second(*folders: str, bind: str = "") -> dict[str, dict[str, float]]:
    """``captured`` in the second model runner."""
    more = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    found = captured(*folders, **more, **({"VLLM_CPU_OMP_THREADS_BIND": bind} if bind else {}))
    return {f"{name} v2": errors for name, errors in found.items()}


def captured(*folders: str, **more: str) -> dict[str, dict[str, float]]:
    """What ``tests.teacher.capture_models`` prints."""
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.teacher.capture_models", *folders]
    environment = {**os.environ, "PYTHONPATH": str(repository), **more}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=repository)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_preempted_sequence_is_captured_once(report: dict[str, dict[str, float]]) -> None:
    assert report["Qwen3@tight"]["preemptions"] > 0
    assert report["Qwen3@tight v2"]["preemptions"] > 0


def test_prompts_are_read_no_further_ahead_than_the_window(report: dict[str, dict[str, float]]) -> None:
    """Two times max_num_seqs run at once, and a few more wait to be taken; memory does not grow with the data."""
    assert all(0 < errors["lead"] <= 12 for errors in report.values())


def test_an_error_of_the_data_is_not_taken_for_one_of_the_engine(report: dict[str, dict[str, float]]) -> None:
    """Else a store that is down would have the teacher loaded again, three times."""
    assert all(errors["own error"] for errors in report.values())


def test_both_model_runners_were_at_work(report: dict[str, dict[str, float]]) -> None:
    assert {name for name, errors in report.items() if errors["v2"]} == {f"{name} v2" for name in SECOND}


def test_a_compiled_model_gives_its_states_too(report: dict[str, dict[str, float]]) -> None:
    assert {name for name, errors in report.items() if errors["compiled"]} == {"Qwen3@compiled"}


@pytest.mark.parametrize("family", [name for name in RUNS if name.startswith("Qwen3") and "Moe" not in name])
def test_answers_are_captured_while_they_are_written(family: str, report: dict[str, dict[str, float]]) -> None:
    worst = report[family]
    assert worst["greedy"] <= 1e-3
    assert worst["answer topk_logprobs"] <= 1e-3
    assert worst["answer best"] <= 1e-3
    for temperature in (4, 2, 1):
        assert worst[f"answer log_z {temperature}"] <= 1e-4
        assert worst[f"answer log_tail {temperature}"] <= 1e-3
    assert worst["shortest"] < worst["longest"] <= 40
    assert worst["different"] >= 6, "eight drawn answers are not the same few"


@pytest.mark.parametrize("family", RUNS)
def test_capture_equals_the_familys_own_logits(family: str, report: dict[str, dict[str, float]]) -> None:
    worst = report[family]
    assert worst["spread"] > 0.2, "the logits must differ enough for an error to show"
    assert worst["topk_logprobs"] <= 1e-3
    assert worst["best"] <= 1e-3
    for temperature in (4, 2, 1):
        assert worst[f"log_z {temperature}"] <= 1e-4
        assert worst[f"log_tail {temperature}"] <= 1e-3
