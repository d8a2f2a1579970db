"""Real text and a teacher flow in; a cache made by the pipeline flows out, with the teacher's exact final states.

With them and the LM head, ``ExactTeacher`` gives the whole distribution at any position of the cache: what online
distillation would train on, and what students are measured by.

``N`` positions, ``D`` hidden size, ``R`` rank, ``V`` vocabulary.
"""

import gzip
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from distill.cache.projection import Projection
from distill.config import CacheConfig
from distill.interrupt import Interrupt
from distill.launch.worker import Worker
from distill.records import Prompt
from distill.teacher import calibration
from distill.teacher.fill import fill
from distill.teacher.job import Job, prepare
from distill.teacher.transformers_engine import TransformersEngine

STATES, HEAD = "exact_states.safetensors", "exact_head.safetensors"


def take_rows(source: Path, *, num: int, skip: int, least: int) -> list[dict[str, Any]]:
    """``num`` rows of a gzip JSON-lines file after ``skip``, of those with a field of ``least`` characters."""
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        long = (row for row in rows if max(map(len, map(str, row.values()))) >= least)
        taken = list(itertools.islice(long, skip, skip + num))
    if len(taken) < num:
        raise SystemExit(f"{source} has {len(taken)} of the {num} rows asked for.")
    return taken


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSON lines; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_cache(config: CacheConfig, *, hidden_bytes: Sequence[int], calibration_tokens: int) -> None:
    """The cache at ``config.out``, exact states, head, and a projection for each of ``hidden_bytes``.

    They lie in ``projection-<bytes>.safetensors``; the cache's own is a copy of the configured one.
    """
    root = Path(config.out)
    if (root / STATES).exists():
        return
    job = prepare(config)
    engine = TransformersEngine(job.config, vocab_size=job.writer.plan.identity.vocab_size)
    sample = _calibration_sample(job, calibration_tokens)
    for num_bytes in hidden_bytes:
        projection = calibration.fit(engine, sample, hidden_bytes=num_bytes)
        (root / f"projection-{num_bytes}.safetensors").write_bytes(projection.to_bytes())
    own = (root / f"projection-{config.targets.hidden_bytes}.safetensors").read_bytes()
    engine.install(Projection.from_bytes(job.writer.put_once("projection.safetensors", own)))
    with Interrupt(at_once=True) as interrupt:
        fill(engine, writer=job.writer, worker=Worker(), read_unit=job.read_unit, interrupt=interrupt, quiet=False)
    job.writer.seal()
    save_file({"head": engine.head_times(np.eye(engine.head_gram().shape[0]))}, root / HEAD)
    save_file(_exact_states(job, engine), root / STATES)


def _exact_states(job: Job, engine: TransformersEngine) -> dict[str, NDArray[np.float32]]:
    """The final states of trained positions, by sequence."""
    items = (item for unit in job.writer.plan.units for item in job.read_unit(unit))
    prompts = [item for item in items if isinstance(item, Prompt)]
    return {
        prompts[ordinal].sequence_id: hidden_ND[prompts[ordinal].loss_mask]
        for ordinal, hidden_ND in engine.hidden_states(prompts)
    }


def _calibration_sample(job: Job, num_tokens: int) -> list[Prompt]:
    """Training sequences of all domains, drawn as capture draws them, until they have ``num_tokens`` trained tokens."""
    trained_on = {index for index, source in enumerate(job.sources) if source.split != "eval"}
    units = [unit for unit in job.writer.plan.units if unit.source in trained_on]
    prompts = [item for unit in units for item in job.read_unit(unit) if isinstance(item, Prompt)]
    sample: list[Prompt] = []
    trained = 0
    for index in np.random.default_rng(job.config.seed).permutation(len(prompts)):
        if trained >= num_tokens:
            break
        sample.append(prompts[index])
        trained += int(prompts[index].loss_mask.sum())
    return sample


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactTeacher:
    """The teacher's final states at trained positions, by sequence, and its LM head."""

    states: dict[str, NDArray[np.float32]]  # sequence_id -> [n, D]
    head_VD: Tensor

    @staticmethod
    def open(root: Path) -> "ExactTeacher":
        """What ``make_cache`` left."""
        head = load_file(root / HEAD)["head"]
        return ExactTeacher(states=load_file(root / STATES), head_VD=torch.from_numpy(head))

    def logits(self, states_ND: Tensor) -> Tensor:
        """The teacher's logits over the real vocabulary, [N, V] float32."""
        return states_ND @ self.head_VD.T
