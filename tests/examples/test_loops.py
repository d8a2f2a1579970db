"""The examples of other people's loops run on a real cache, and the student comes closer to the teacher.

What it protects: the few lines that somebody with a trainer of their own copies.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import distill
from examples import bare_loop, trainer

ROOT = Path(__file__).parents[2]


def student_of(world: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(world.student, dtype=torch.float32)


def fell(losses: list[float]) -> bool:
    third = len(losses) // 3
    return sum(losses[-third:]) < 0.9 * sum(losses[:third])


def test_a_bare_loop_lowers_the_loss(world: Any) -> None:
    losses = list(
        bare_loop.train(student_of(world), str(world.cache), temperature=2.0, learning_rate=3e-3, batch_tokens=100)
    )
    assert len(losses) >= 15
    assert fell(losses), losses


@pytest.mark.parametrize(("page", "cache"), [("docs/api.md", "cache"), ("README.md", "caches/qwen72b")])
def test_the_loops_of_the_pages_run(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, cache: str
) -> None:
    (snippet,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
        if "kd_loss(hidden, model" in block
    )
    shutil.copytree(world.cache, tmp_path / cache)
    monkeypatch.chdir(tmp_path)
    model = student_of(world)
    before = model.lm_head.weight.detach().clone()
    exec(snippet, {"distill": distill, "model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)})
    assert not torch.equal(model.lm_head.weight, before)


def test_the_trainer_of_transformers_lowers_the_loss_and_resumes(world: Any, tmp_path: Path) -> None:
    settings = {
        "temperature": 2.0,
        "batch_tokens": 100,
        "output_dir": str(tmp_path),
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 15,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    whole = trainer.trainer_of(student_of(world), str(world.cache), max_steps=18, **settings)
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert len(losses) == 18
    assert fell(losses), losses
    resumed = trainer.trainer_of(student_of(world), str(world.cache), max_steps=18, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    again = {line["step"]: line["loss"] for line in resumed.state.log_history if "loss" in line}
    for line in whole.state.log_history:
        if "loss" in line:
            assert again[line["step"]] == pytest.approx(line["loss"], rel=1e-4), line["step"]


def test_the_command_line_trains_and_saves(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["bare_loop", str(world.cache), str(world.student), "--out", str(out)])
    bare_loop.main()
    assert "step 1: " in capsys.readouterr().out
    assert (out / "model.safetensors").is_file()
