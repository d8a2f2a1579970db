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

SECOND = ("Qwen3", "Qwen3@tight")  # also in vLLM's second model runner


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Largest errors of each family; all of them are captured in one process."""
    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        save_tiny(name, root / name)
    return {
        **captured(*(str(root / name) for name in (*FAMILIES, "Qwen3@tight"))),
        **{f"{name} v2": errors for name, errors in captured(*(str(root / n) for n in SECOND), v2=True).items()},
    }


def captured(*folders: str, v2: bool = False) -> dict[str, dict[str, float]]:
    """What ``tests.teacher.capture_models`` prints."""
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.teacher.capture_models", *folders]
    second = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"} if v2 else {}
    environment = {**os.environ, "PYTHONPATH": str(repository), **second}
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


def test_both_model_runners_were_at_work(report: dict[str, dict[str, float]]) -> None:
    assert {name for name, errors in report.items() if errors["v2"]} == {f"{name} v2" for name in SECOND}


@pytest.mark.parametrize("family", [*FAMILIES, "Qwen3@tight", "Qwen3 v2", "Qwen3@tight v2"])
def test_capture_equals_the_familys_own_logits(family: str, report: dict[str, dict[str, float]]) -> None:
    worst = report[family]
    assert worst["spread"] > 0.2, "the logits must differ enough for an error to show"
    assert worst["topk_logprobs"] <= 1e-3
    assert worst["best"] <= 1e-3
    for temperature in (4, 2, 1):
        assert worst[f"log_z {temperature}"] <= 1e-4
        assert worst[f"log_tail {temperature}"] <= 1e-3
