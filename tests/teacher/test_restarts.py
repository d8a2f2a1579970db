"""A teacher that dies or hangs is loaded again, with smaller batches, three times at most; what was committed stays.

The real engine runs here; a hook on its model fails as an allocator does when a batch is too large for it, or waits for
what never comes.
"""

import json
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.cache.reader import CacheReader
from distill.config import CacheConfig
from distill.errors import EngineError
from distill.records import Prompt
from distill.report.verify import verify
from distill.teacher import job
from distill.teacher.job import cache_teacher


class Fragile:
    """Loads teachers that fail beyond ``most`` tokens in a batch, and remembers what each took at once.

    The first one fails in any case once ``after`` units are committed: with ``hangs`` it never answers.
    """

    def __init__(self, most: int, *, after: int | None = None, hangs: bool = False) -> None:
        self.most, self.after, self.hangs = most, after, hangs
        self.loaded = list[int]()
        self.models = list[weakref.ref[torch.nn.Module]]()
        self._load = job.load_engine

    def __call__(self, config: CacheConfig, *, vocab_size: int) -> Any:
        assert not any(model() is not None for model in self.models), "two teachers at a time need twice the memory"
        engine: Any = self._load(config, vocab_size=vocab_size)
        self.loaded.append(engine.batch_tokens)
        self.models.append(weakref.ref(engine._model))

        def look(_model: torch.nn.Module, _arguments: Any, named: dict[str, Any]) -> None:
            num_committed = len(list(Path(config.out, "commits").glob("*.json")))
            fails = self.after is not None and len(self.loaded) == 1 and num_committed >= self.after
            if fails and self.hangs:
                threading.Event().wait()
            if fails or named["input_ids"].numel() > self.most:
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
        eval_fraction=0.0,
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
    with pytest.raises(EngineError, match=r"transformers engine stopped: Def.*run the same command again") as caught:
        cache_teacher(config, quiet=True)
    assert caught.value.exit_code == 75
    assert fragile.loaded == [2048, 1024, 512, 256]


def test_a_step_keeps_a_token_for_each_sequence(config: CacheConfig) -> None:
    loaded: Any = SimpleNamespace(batch_option="max_num_batched_tokens", batch_tokens=1024)
    many = config.model_copy(update={"engine_options": {"max_num_seqs": 700}})
    assert job._with_smaller_batches(many, loaded).engine_options["max_num_batched_tokens"] == 700
    few = config.model_copy(update={"engine_options": {"max_num_seqs": 16}})
    assert job._with_smaller_batches(few, loaded).engine_options["max_num_batched_tokens"] == 512


def test_a_teacher_that_hangs_is_given_up(
    config: CacheConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fragile = Fragile(most=4096, after=1, hangs=True)
    monkeypatch.setattr(job, "load_engine", fragile)
    slow = config.model_copy(update={"engine_options": {"batch_tokens": 256}, "stall_seconds": 20.0})
    assert cache_teacher(slow, quiet=True).manifest is not None
    assert fragile.loaded == [256, 256]
    assert "engine hangs: no sign of life for 20 s" in capsys.readouterr().err
    assert verify(config.out).ok


@pytest.mark.parametrize("layers", [(), (1,)])
def test_the_result_counts_what_the_engine_that_died_had_done(
    config: CacheConfig, monkeypatch: pytest.MonkeyPatch, layers: tuple[int, ...]
) -> None:
    """Hooks on inner layers must not keep a dead teacher's weights either."""
    fragile = Fragile(most=4096, after=2)
    monkeypatch.setattr(job, "load_engine", fragile)
    targets = config.targets.model_copy(update={"layers": layers, "layer_bytes": 16})
    small = config.model_copy(update={"engine_options": {"batch_tokens": 256}, "targets": targets})
    result = cache_teacher(small, quiet=True)
    assert len(fragile.loaded) == 2
    assert result.manifest is not None
    assert result.num_units_written == len(result.manifest.commits) == 6
    assert result.num_targets == result.manifest.totals.num_targets.total


def test_a_long_pass_is_no_hang_while_its_layers_go_on(config: CacheConfig) -> None:
    prepared = job.prepare(config.model_copy(update={"stall_seconds": 1.0}))
    engine: Any = job.load_engine(prepared.config, vocab_size=prepared.writer.plan.identity.vocab_size)
    for layer in engine._model.model.layers:
        layer.register_forward_pre_hook(lambda *_: threading.Event().wait(0.6) or None)
    prompts = [item for item in prepared.read_unit(prepared.writer.plan.units[0]) if isinstance(item, Prompt)]
    assert engine.moments(prompts[:1]).count > 0
    engine.close()
