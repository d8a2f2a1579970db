"""A teacher whose numbers change is stopped, and one that only batches differently is not."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.cache import tensors
from distill.cache.writer import CacheWriter
from distill.errors import CorruptionError
from distill.interrupt import Interrupt
from distill.launch.worker import Worker
from distill.records import Prompt, Targets
from distill.teacher import canary
from distill.teacher.fill import fill
from tests.cache.conftest import TinyTeacher, make_teacher, plan_of, rows_of


class Shaky:
    """A teacher whose states carry ``noise`` of their own at each reading, and are off by ``drift`` after ``sound``."""

    def __init__(self, teacher: TinyTeacher, *, noise: float = 0.0, drift: float = 0.0, sound: int = 10**9) -> None:
        self.teacher, self.noise, self.drift, self.sound = teacher, noise, drift, sound
        self.num_read = 0
        self.random = np.random.default_rng(0)

    def capture(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Targets]]:
        for ordinal, prompt in enumerate(prompts):
            self.num_read += 1
            is_off = self.num_read > self.sound
            hidden_ND = self.teacher.hidden(np.random.default_rng(int(prompt.input_ids.sum())), prompt.num_targets)
            hidden_ND = hidden_ND + self.noise * self.random.standard_normal(hidden_ND.shape)
            targets = self.teacher.targets(hidden_ND + np.nan_to_num(self.drift if is_off else 0.0))
            if np.isnan(self.drift) and is_off:
                targets = replace(targets, log_z=np.full_like(targets.log_z, np.nan))
            yield ordinal, targets


@pytest.fixture(scope="module")
def teacher() -> TinyTeacher:
    return make_teacher()


@pytest.fixture
def writer(tmp_path: Path, teacher: TinyTeacher) -> CacheWriter:
    writer = CacheWriter.open(tmp_path / "cache", plan_of(teacher, rows={"general": 12}))
    assert teacher.projection is not None
    writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    return writer


def run(engine: Any, teacher: TinyTeacher, writer: CacheWriter) -> int:
    """Fills the cache with canaries in each unit; how many units were written."""
    prompts = [row.prompt for unit in writer.plan.units for row in rows_of(teacher, unit)]
    canaries = canary.release(engine, canary.choose(iter(prompts)), writer)
    assert len(canaries) == canary.NUM
    with Interrupt(at_once=False) as interrupt:
        filled = fill(
            engine,
            writer=writer,
            worker=Worker(),
            read_unit=lambda unit: canary.with_canaries((row.prompt for row in rows_of(teacher, unit)), canaries),
            interrupt=interrupt,
            quiet=True,
        )
    return filled.num_units


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.05])
def test_noise_is_no_drift_and_canaries_are_not_stored(teacher: TinyTeacher, writer: CacheWriter, noise: float) -> None:
    assert run(Shaky(teacher, noise=noise), teacher, writer) == len(writer.plan.units)
    manifest = writer.seal()
    assert manifest is not None
    assert manifest.totals.num_rows.total + manifest.totals.num_rejects == 12


@pytest.mark.parametrize(("noise", "drift"), [(0.0, 0.02), (1e-3, 0.05), (0.02, 1.0)])
def test_a_drift_beyond_the_noise_stops_the_run(
    teacher: TinyTeacher, writer: CacheWriter, noise: float, drift: float
) -> None:
    engine = Shaky(teacher, noise=noise, drift=drift, sound=2 * canary.NUM + 7)
    with pytest.raises(CorruptionError, match=r"the teacher has drifted: in unit 0000[12]"):
        run(engine, teacher, writer)
    assert 0 < len(writer.missing_units()) < len(writer.plan.units)


def test_a_nan_is_a_drift(teacher: TinyTeacher, writer: CacheWriter) -> None:
    with pytest.raises(CorruptionError, match="drifted"):
        run(Shaky(teacher, drift=np.nan, sound=2 * canary.NUM + 7), teacher, writer)


def test_a_worker_that_is_off_from_the_start_is_refused(teacher: TinyTeacher, writer: CacheWriter) -> None:
    run(Shaky(teacher), teacher, writer)
    run(Shaky(teacher, noise=1e-3), teacher, writer)
    with pytest.raises(CorruptionError, match="the worker that began this cache"):
        run(Shaky(teacher, drift=0.5, sound=0), teacher, writer)


def test_a_file_of_canaries_that_lacks_something(teacher: TinyTeacher, writer: CacheWriter) -> None:
    run(Shaky(teacher), teacher, writer)
    path = Path(str(writer.root)) / canary.CANARIES_FILE
    arrays, metadata = tensors.load(path.read_bytes(), name="canaries")
    del arrays["1/log_z"]
    path.write_bytes(tensors.dump(arrays, metadata))
    with pytest.raises(CorruptionError, match=r"canaries\.safetensors lacks or garbles '1/log_z'"):
        run(Shaky(teacher), teacher, writer)


def test_drift_is_total_variation_of_what_is_kept(teacher: TinyTeacher) -> None:
    targets = teacher.sequence(1).targets
    known = canary.kept(targets)
    assert canary.drift(known, known) == 0
    swapped = replace(targets, topk_ids=targets.topk_ids + 1)
    same_NKK = targets.topk_ids[:, :, None] == swapped.topk_ids[:, None, :]
    p_NK = np.exp(targets.topk_logprobs.astype(np.float64))
    lost_N = [
        0.5 * sum(abs(a - (same[i] * p).sum()) for i, a in enumerate(p)) + 0.5 * (p.sum() - (same * p).sum())
        for p, same in zip(p_NK, same_NKK, strict=True)
    ]
    assert canary.drift(known, canary.kept(swapped)) == pytest.approx(np.mean(lost_N))
    assert canary.drift(known, canary.kept(replace(targets, log_z=targets.log_z + 0.25))) == pytest.approx(0.25)
