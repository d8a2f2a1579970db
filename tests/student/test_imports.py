"""Protects the walls of the room: a student never meets vllm, and peft only when LoRA is asked for."""

import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, sys
import distill.student
for module in pkgutil.walk_packages(distill.student.__path__, "distill.student."):
    importlib.import_module(module.name)
assert "distill.student.trainer" in sys.modules
print(sorted({name.split(".")[0] for name in sys.modules} & {"vllm", "peft", "wandb", "transformers"}))
"""


def test_importing_every_module_loads_neither_vllm_nor_peft_nor_wandb():
    found = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"
