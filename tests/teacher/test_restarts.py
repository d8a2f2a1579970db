"""A teacher that dies is loaded again, with smaller batches, three times at most; what was committed stays.

The real engine runs here; a hook on its model fails as an allocator does when a batch is too large for it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cache.reader import CacheReader
from distill.config import CacheConfig
from distill.errors import EngineError
from distill.report.verify import verify
from distill.teacher import job
from distill.teacher.job import cache_teacher


class Fragile:
    """Loads teachers that fail beyond ``most`` tokens in a batch, and remembers what each took at once."""

    def __init__(self, most: int) -> None:
        self.most, self.loaded = most, list[int]()
        self._load = job.load_engine

    def __call__(self, config: CacheConfig, *, vocab_size: int) -> Any:
        engine: Any = self._load(config, vocab_size=vocab_size)
        self.loaded.append(engine.batch_tokens)

        def look(_model: torch.nn.Module, _arguments: Any, named: dict[str, Any]) -> None:
            if named["input_ids"].numel() > self.most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        engine._model.model.register_forward_pre_hook(look, with_kwargs=True)
        return engine


@pytest.fixture
def config(tmp_path: Path, tiny_teacher: Path) -> CacheConfig:
    rows = [{"text": f"row {i}: " + "a river runs to the sea, " * (1 + i % 9)} for i in range(60)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return CacheConfig(
        teacher=str(tiny_teacher),
        data={"texts": (str(data),)},
        out=str(tmp_path / "cache"),
        engine="transformers",
        engine_options={"batch_tokens": 2048},
        dtype="float32",
        unit_rows=10,
        max_length=128,
    )


def test_a_teacher_that_lacks_memory_goes_on_with_smaller_batches(
    config: CacheConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fragile = Fragile(most=700)
    monkeypatch.setattr(job, "load_engine", fragile)
    assert cache_teacher(config, quiet=True).manifest is not None
    assert fragile.loaded == [2048, 1024, 512]
    assert "Loading it again with smaller batches, 3 more tries" in capsys.readouterr().err
    assert verify(config.out).ok
    assert CacheReader.open(config.out).num_rows() == 60


def test_a_teacher_that_always_dies_is_given_up(config: CacheConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    fragile = Fragile(most=0)
    monkeypatch.setattr(job, "load_engine", fragile)
    with pytest.raises(EngineError, match=r"forward pass failed.*run the same command again") as caught:
        cache_teacher(config, quiet=True)
    assert caught.value.exit_code == 75
    assert fragile.loaded == [2048, 1024, 512, 256]
