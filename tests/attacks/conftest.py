"""A sound cache, a sound checkpoint and a trap: a file that appears if anything that was opened ran as code."""

import pickle
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distill.student.checkpoint import MODEL, State, write_checkpoint
from tests.cache import conftest as cache_fixtures
from tests.student import conftest as student_fixtures

teacher = cache_fixtures.teacher
plan = cache_fixtures.plan
cache = cache_fixtures.cache
world = student_fixtures.world


@dataclass(frozen=True, slots=True, kw_only=True)
class Trap:
    """What an attacker leaves: code and pickles that create ``sprung``."""

    sprung: Path

    def code(self) -> str:
        """A Python module that springs the trap when it is imported."""
        return textwrap.dedent(f"""
            import pathlib
            pathlib.Path({str(self.sprung)!r}).touch()
            class EvilConfig: pass
            class EvilModel: pass
            class EvilTokenizer: pass
        """)

    def pickled(self) -> bytes:
        """Bytes that spring the trap when they are unpickled."""
        return pickle.dumps(_Touch(str(self.sprung)))


class _Touch:
    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self._path),)


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    """Not sprung yet."""
    return Trap(sprung=tmp_path / "sprung")


@pytest.fixture(scope="session")
def sound(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a student, with all weights and with an adapter: tune -> folder."""
    import peft
    from transformers import AutoModelForCausalLM

    run = tmp_path_factory.mktemp("run") / "stage1"

    def full(folder: Path) -> None:
        shutil.copytree(world.student, folder / MODEL)

    def lora(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(world.student)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        adapted.save_pretrained(folder / MODEL)

    state = State(stage=1, step=1, position=4, finished=True, settings={})
    write_checkpoint(run / "full", state, full)
    write_checkpoint(run / "lora", state.model_copy(update={"base": str(world.student)}), lora)
    return {"full": run / "full", "lora": run / "lora"}


@pytest.fixture
def checkpoint(sound: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint, to be tampered with."""
    return lambda tune: Path(shutil.copytree(sound[tune], tmp_path / f"{tune}-checkpoint"))
