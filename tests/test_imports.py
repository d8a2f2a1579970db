"""What a fresh interpreter loads: the rooms' external dependencies, which import-linter does not follow.

What it protects: ``distill --help`` stays quick, a cache opens without torch, a student trains without vllm.
"""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "vllm", "peft", "datasets", "pyarrow", "pandas", "numpy", "pydantic"}
LEARNING = {"torch", "transformers", "vllm", "peft"}


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (("distill.__main__",), HEAVY),
        (("distill",), HEAVY),
        (("distill.cache.reader", "distill.cache.writer", "distill.cache.frames"), LEARNING),
        (("distill.report.inspect", "distill.report.verify", "distill.report.render"), LEARNING),
        (("distill.student.trainer", "distill.student.evaluate"), {"vllm"}),
        (("distill.teacher.job", "distill.teacher.transformers_engine"), {"vllm", "peft"}),
        (("distill.data.prompts",), {"vllm", "peft", "torch"}),
    ],
)
def test_modules_load_no_more_than_they_need(modules: tuple[str, ...], forbidden: set[str]) -> None:
    code = f"import sys, {', '.join(modules)}; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not forbidden & set(done.stdout.split())
