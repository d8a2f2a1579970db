"""A configuration and an open cache flow in, everything that a stage's training is made of flows out, or a refusal.

All of it is decided before any model is loaded.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from distill.cache.reader import CacheReader
from distill.config import AttentionConfig, ShareConfig, StageConfig, TrainConfig, WeightsConfig
from distill.errors import DataError, IdentityError, UsageError
from distill.student.checkpoint import State
from distill.student.mixture import BLOCK, assign_domains, has_share, scheduled_shares
from distill.student.order import DomainOrder
from distill.student.sampling import Cell, Sampler, cells_of
from distill.student.schedule import weights_at

# Settings that older runs do not name, and what they did.
_BEFORE: dict[str, JsonValue] = {"stage.contrastive_negatives": "all"}
# Keys that change speed, memory or place, but neither what is learned nor in which order.
_FREE = frozenset(
    {
        "allow_incomplete",
        "cache",
        "device",
        "gradient_checkpointing",
        "head_chunk",
        "micro_batch_tokens",
        "out",
        "packing",
        "parallel",
        "sample_tokens",
        "samples",
        "stages",
        "tensorboard",
        "trust_remote_code",
        "wandb",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A stage that can be trained: ``assigned[n]`` is the number of the cell that supplies sequence n.

    Cells are the domains, unless sampling tells groups of them apart. With ``sampler`` the array is filled while the
    stage is trained.
    """

    number: int
    stage: StageConfig
    domains: tuple[str, ...]
    cells: tuple[Cell, ...]
    orders: tuple[DomainOrder, ...]  # of the cells
    num_steps: int
    assigned: NDArray[np.uint16]
    scheduled: NDArray[np.float64]  # [steps + 1, D], scheduled sequences of each domain up to a step
    sampler: Sampler | None

    def scheduled_at(self, step: int) -> dict[str, float]:
        """Each domain's scheduled share of the sequences of a step, counted from 0."""
        counts = self.scheduled[step + 1] - self.scheduled[step]
        return {domain: float(counts[i] / self.stage.batch_size) for i, domain in enumerate(self.domains)}

    def shares(self, step: int) -> dict[str, dict[str, float]]:
        """Each domain's realised and scheduled share of the sequences up to a step."""
        consumed = step * self.stage.batch_size
        counts = np.zeros(len(self.domains))
        for cell, num in zip(self.cells, np.bincount(self.assigned[:consumed], minlength=len(self.cells)), strict=True):
            counts[self.domains.index(cell.domain)] += num
        return {
            domain: {"realised": float(counts[i] / consumed), "scheduled": float(self.scheduled[step, i] / consumed)}
            for i, domain in enumerate(self.domains)
        }


def plan_stage(config: TrainConfig, number: int, reader: CacheReader) -> StagePlan:
    """The plan of stage ``number`` on ``reader``.

    An epoch is the train rows, once, of all domains that ever have a share; the number of steps is
    ceil(epochs rows / batch_size), or ``max_steps``. Raises what ``servable_stage`` raises.
    """
    stage = servable_stage(config, number, reader)
    shares = _positive_shares(stage)
    cells = cells_of(reader, shares, stage)
    orders = tuple(
        DomainOrder(
            cell.units,
            domain=cell.domain,
            seed=config.seed,
            shard_window=config.shard_window,
            group=None if cell.group is None else (stage.sampling_by, cell.group),
        )
        for cell in cells
    )
    num_rows = sum(order.num_rows for order in orders)
    num_steps = stage.max_steps or max(1, math.ceil(stage.epochs * num_rows / stage.batch_size))
    num_sequences = num_steps * stage.batch_size
    driven = stage.sampling == "evaluation"
    assigned = np.zeros(num_sequences, np.uint16) if driven else assign_domains(shares, num_sequences)
    return StagePlan(
        number=number,
        stage=stage,
        domains=tuple(shares),
        cells=cells,
        orders=orders,
        num_steps=num_steps,
        assigned=assigned,
        scheduled=_scheduled_counts(shares, num_steps, stage.batch_size),
        sampler=Sampler(shares, cells, stage, assigned=assigned) if driven else None,
    )


def servable_stage(config: TrainConfig, number: int, reader: CacheReader) -> StageConfig:
    """Stage ``number``, which ``reader`` has the targets and rows for; no shard is read.

    Raises UsageError for what this version cannot do, IdentityError for targets that the cache does not hold,
    DataError for missing domains and rows.
    """
    stage = _at_held_temperatures(_stage_of(config, number), reader)
    domains = tuple(_positive_shares(stage))
    _refuse_weightless(number, stage)
    _refuse_pointless(number, stage)
    _check_hidden(number, stage, reader)
    _check_sampled(number, stage, reader)
    _check_heads(number, stage, reader)
    _check_domains(number, domains, reader)
    _check_sampling(number, stage, reader, domains)
    return stage


def _positive_shares(stage: StageConfig) -> dict[str, ShareConfig]:
    return {domain: share for domain, share in stage.shares.items() if has_share(share)}


def stage_folder(config: TrainConfig, number: int) -> Path:
    """``RUN/stage<number>``."""
    return Path(config.out) / f"stage{number}"


def settings_of(config: TrainConfig, plan: StagePlan, reader: CacheReader, start: str) -> dict[str, JsonValue]:
    """What must be equal for a run to go on where another stopped, as flat keys and plain values.

    ``cache`` itself may move: its identity, units and row counts count, since the order follows from them.
    """
    units = [[c.unit, c.domain, c.num_rows.train, c.num_rows.eval] for c in reader.commits]
    values = {
        **{key: value for key, value in config.model_dump(mode="json").items() if key not in _FREE},
        "student": Path(config.student).as_posix(),  # ./student is student
        "stage": {"number": plan.number, **plan.stage.model_dump(mode="json")},
        "start": start,
        "cache_identity": reader.identity.model_dump(mode="json"),
        "cache_units": hashlib.sha256(json.dumps(units).encode()).hexdigest()[:16],
    }
    return _flat(values)


def refuse_other_settings(folder: Path, state: State, asked: dict[str, JsonValue]) -> None:
    """Raise UsageError when the run in ``folder`` was begun with other settings; name each one that differs."""
    there = {**_BEFORE, **state.settings, "student": Path(str(state.settings.get("student"))).as_posix()}
    if state.finished or there.get("precision") == "auto":  # nothing is left to compute; and older runs do not say
        there["precision"] = asked.get("precision")
    lines = [
        f"{key} is {json.dumps(there.get(key))} there and {json.dumps(asked.get(key))} now"
        for key in sorted(set(there) | set(asked))
        if there.get(key) != asked.get(key)
    ]
    if lines:
        raise UsageError(
            f"{folder} was begun with another configuration, up to step {state.step}: {'; '.join(lines)}. Use another "
            "--out for the new one, or the old values to go on."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, JsonValue]:
    flat: dict[str, JsonValue] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _stage_of(config: TrainConfig, number: int) -> StageConfig:
    try:
        return config.stage(number)
    except ValueError as error:
        raise UsageError(f"{error}. Use --stage 1, 2, 3 or 1-3.") from error


def _at_held_temperatures(stage: StageConfig, reader: CacheReader) -> StageConfig:
    """The stage at the cache's own temperatures: 2.0000000001 is 2. Raises IdentityError where it lacks one."""

    def held(temperature: float) -> float:
        return reader.temperatures[reader.temperature_index(temperature)]

    steps = stage.temperature_steps
    if steps is not None:
        steps = steps.model_copy(update={"values": tuple(held(temperature) for temperature in steps.values)})
    return stage.model_copy(update={"temperature": held(stage.temperature), "temperature_steps": steps})


def _refuse_weightless(number: int, stage: StageConfig) -> None:
    """Raise UsageError where no loss has a weight, if only for a time, or a schedule is of no loss."""
    known = list(WeightsConfig.model_fields)
    unknown = sorted(set(stage.weight_schedules) - set(known))
    if unknown:
        raise UsageError(f"stages.{number}.weight_schedules: there is no loss {unknown[0]}. Use {', '.join(known)}.")
    for progress in np.linspace(0, 1, 1001)[:-1]:
        if not any(weights_at(stage, float(progress)).model_dump().values()):
            raise UsageError(
                f"stages.{number}.weights are all 0 at {progress:.0%} of the stage, so there is nothing to learn. Give "
                "a loss a weight."
            )
        if not stage.weight_schedules:
            return


def _refuse_pointless(number: int, stage: StageConfig) -> None:
    """Raise UsageError for a key about how a loss works that this stage does not have."""
    if stage.beta is not None and stage.divergence not in ("js", "skew"):
        raise UsageError(
            f"stages.{number}.beta is {stage.beta:g}, but its divergence is {stage.divergence}, which mixes nothing. "
            "Leave beta out, or set the divergence to js or skew."
        )
    pairs = stage.feature.layers not in ("auto", "none")
    for name, asked, weight in (
        ("feature", pairs, stage.weights.feature),
        ("attention", stage.attention != AttentionConfig(), stage.weights.attention),
    ):
        if asked and not weight:
            raise UsageError(
                f"stages.{number}.{name} says how the {name} loss works, but stages.{number}.weights.{name} is 0. "
                f"Leave {name} out, or give the loss a weight."
            )


def _check_hidden(number: int, stage: StageConfig, reader: CacheReader) -> None:
    if reader.hidden_bytes:
        return
    for name, weight in (("feature", stage.weights.feature), ("contrastive", stage.weights.contrastive)):
        if weight > 0:
            raise IdentityError(
                f"stages.{number}.weights.{name} is {weight:g}, but {reader.where} {reader.why_no_hidden}: there are "
                "no hidden states to compare with. Set the weight to 0, or make a cache with --hidden-bytes 128."
            )
    if stage.weights.kl > 0 and stage.tail == "low_rank":
        raise IdentityError(
            f"stages.{number}.tail is low_rank, but {reader.where} {reader.why_no_hidden}: nothing tells the "
            f"tail's shape. Set stages.{number}.tail to bucket, or make a cache with --hidden-bytes 128."
        )


def _check_sampled(number: int, stage: StageConfig, reader: CacheReader) -> None:
    if stage.tail != "sampled":
        return
    if not reader.identity.num_samples:
        raise IdentityError(
            f"stages.{number}.tail is sampled, but {reader.where} holds no ids drawn from the teacher. Set "
            f"stages.{number}.tail to low_rank or bucket, or make a cache with targets.num_samples 50."
        )
    temperatures = (stage.temperature,) if stage.temperature_steps is None else stage.temperature_steps.values
    if any(temperature != 1.0 for temperature in temperatures):
        raise IdentityError(
            f"stages.{number}.tail is sampled and its temperature {max(temperatures):g}, but ids are drawn from the "
            f"teacher at temperature 1 and say nothing about others. Set stages.{number}.temperature to 1, or "
            f"stages.{number}.tail to low_rank."
        )
    if stage.divergence != "forward":
        raise UsageError(
            f"stages.{number}.tail is sampled, from which only the forward divergence can be estimated, not "
            f"{stage.divergence}. Set stages.{number}.divergence to forward, or stages.{number}.tail to low_rank."
        )


def _check_heads(number: int, stage: StageConfig, reader: CacheReader) -> None:
    if stage.weights.attention > 0 and not (reader.identity.heads and reader.hidden_bytes):
        raise IdentityError(
            f"stages.{number}.weights.attention is {stage.weights.attention:g}, but {reader.where} holds no queries "
            "and keys to rebuild attention maps from. Set the weight to 0, or make a cache with targets.heads."
        )


def _check_domains(number: int, domains: Sequence[str], reader: CacheReader) -> None:
    if not domains:
        raise UsageError(
            f"stages.{number}.shares gives no domain a share, so there is nothing to train on. Give one above 0 to a "
            f"domain of {reader.where}, which has {', '.join(reader.domains)}."
        )
    missing = [domain for domain in domains if domain not in reader.domains]
    if missing:
        raise DataError(
            f"stage {number} trains on {' and '.join(domains)}, but {reader.where} has no {' and no '.join(missing)}; "
            f"it has {', '.join(reader.domains)}. Set 'general' and 'domain', or stages.{number}.shares, to domains of "
            "the cache, or add data to it."
        )
    for domain in domains:
        if not reader.num_rows(domain, "train"):
            raise DataError(
                f"{reader.where} has no train rows of the domain {domain}, which stage {number} trains on. Add data "
                f"for it, or leave it out of stages.{number}.shares."
            )


def _check_sampling(number: int, stage: StageConfig, reader: CacheReader, domains: Sequence[str]) -> None:
    """Raise DataError where evaluations are to say what is sampled and there is nothing to evaluate on."""
    if stage.sampling == "evaluation" and not any(reader.num_rows(domain, "eval") for domain in domains):
        raise DataError(
            f"stages.{number}.sampling is evaluation, and {reader.where} has no held-out rows of "
            f"{' or '.join(domains)} that could say which groups come more often. Make the cache with --eval or an "
            "eval_fraction above 0, or set sampling to uniform."
        )


def _scheduled_counts(shares: dict[str, ShareConfig], num_steps: int, batch_size: int) -> NDArray[np.float64]:
    """Scheduled sequences of each domain up to each step: [steps + 1, D]."""
    counts = np.zeros((num_steps + 1, len(shares)))
    block = max(1, BLOCK // batch_size)
    for start in range(0, num_steps, block):
        stop = min(start + block, num_steps)
        progress_N = np.arange(start * batch_size, stop * batch_size) / (num_steps * batch_size)
        shares_ND = scheduled_shares(shares, progress_N)
        counts[start + 1 : stop + 1] = shares_ND.reshape(stop - start, batch_size, -1).sum(axis=1)
    return counts.cumsum(axis=0)
