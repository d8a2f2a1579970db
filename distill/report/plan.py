"""A configuration and what is known of a machine flow in, what the cache would hold and cost flows out.

Without ``measure`` a folder with the teacher's configuration and tokenizer suffices: rows are tokenised as in capture,
the columns that need no teacher are written into memory by the cache's own writer, and the others take the sizes of
``distill.report.typical``. With it the teacher runs over a few sequences (``distill.teacher.measure``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

from distill.config import CacheConfig, TargetsConfig
from distill.errors import DataError, UsageError
from distill.records import Prompt
from distill.report.anatomy import Anatomy, anatomy
from distill.report.plan_record import (
    Counts,
    Flops,
    Interval,
    Memory,
    PlanReport,
    Proposal,
    RejectCount,
    SplitCount,
    Storage,
)
from distill.report.propose import best_choice, choices, joined_hidden
from distill.report.resources import Machine, cost_of, flops_of, held_dtype, largest_batch, memory_of
from distill.report.typical import typical_bytes, typical_rank
from distill.report.workload import Workload, count
from distill.teacher import calibration
from distill.teacher.engine import load_engine
from distill.teacher.examine import Examined, draw, examine, local_model
from distill.teacher.heads import check_layers, kept_heads
from distill.teacher.measure import FIT_SHARE, Measured, divide, measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How closely to look: at ``sample`` rows or all (None), and with the teacher over ``measure`` tokens or not."""

    sample: int | None = None
    measure: int | None = None


def plan(
    config: CacheConfig, *, machine: Machine | None = None, look: Look | None = None, quiet: bool = False
) -> PlanReport:
    """What ``cache-teacher`` would make of ``config``; nothing is written.

    Raises UsageError, DataError or StorageError before any weights load, RetryError when the engine dies.
    """
    machine, look, asked_for = machine or Machine(), look or Look(), config.engine
    _check(config, look)
    if look.measure is None:  # the plan may be for another machine, where vllm is installed
        config = config.model_copy(update={"engine": None})
    seen = examine(config, folder=local_model(config.teacher, config.revision, weights=look.measure is not None))
    text_model = seen.model.get_text_config()
    check_layers(text_model, config.targets)
    load = count(seen.sources, maker=seen.maker, config=seen.config, sample=look.sample, quiet=quiet)
    if not load.num_targets:
        reasons = "; ".join(f"{domain}: {reason}" for domain, reason in list(load.rejects)[:3])
        raise DataError(
            f"none of the {load.num_read} rows that were read becomes a sequence ({reasons}). Mend the data."
        )
    measured = _measured(seen, look.measure) if look.measure is not None else None
    engine = seen.engine if measured else asked_for or "vllm"
    return _Planner(seen=seen, engine=engine, load=load, machine=machine, measured=measured).report()


def _check(config: CacheConfig, look: Look) -> None:
    if look.measure is not None and config.generate is not None:
        raise UsageError(
            "--measure reads answers, and with generate the teacher has yet to write them. Leave generate out, or plan "
            "without --measure."
        )


def _measured(seen: Examined, num_tokens: int) -> Measured:
    """Loads the teacher for a few drawn sequences."""
    wanted = num_tokens * (1 + FIT_SHARE)
    drawn = draw(seen.sources, maker=seen.maker, wanted=wanted, seed=seen.config.seed)
    divided = divide([item for item in drawn if isinstance(item, Prompt)], num_tokens=num_tokens)
    config = seen.config.model_copy(update={"teacher": str(seen.folder)})
    engine = load_engine(config, vocab_size=seen.vocab_size)
    try:
        return measure(engine, divided, targets=config.targets, seed=config.seed)
    finally:
        engine.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planner:
    """Everything that was found out, on its way to a report."""

    seen: Examined
    engine: str
    load: Workload
    machine: Machine
    measured: Measured | None

    def report(self) -> PlanReport:
        config, sizes = self.seen.config, anatomy(self.seen.model)
        memory = self._memory(sizes) if sizes else None
        flops = self._flops(sizes) if sizes else None
        rate = self.measured.capture_tokens_per_s if self.measured else None
        return PlanReport(
            teacher=config.teacher,
            engine=self.engine,
            vocab_size=self.seen.vocab_size,
            top_k=config.targets.top_k,
            temperatures=config.targets.temperatures,
            hidden_bytes=config.targets.hidden_bytes,
            counts=self._counts(),
            storage=self._storage(),
            memory=memory,
            flops=flops,
            cost=cost_of(self._num_tokens(), flops=flops, measured=rate, machine=self.machine),
            measured=self.measured,
            proposal=self._proposal(sizes, memory),
            notes=tuple(self._notes(memory)),
        )

    @property
    def _hidden_size(self) -> int:
        return int(self.seen.model.get_text_config().hidden_size)

    def _counts(self) -> Counts:
        load = self.load
        splits = [
            SplitCount(
                domain=domain,
                split=split,
                num_rows=round(tally.num_rows),
                num_tokens=round(tally.num_tokens),
                num_targets=round(tally.num_targets),
                num_trained=round(tally.num_trained),
            )
            for (domain, split), tally in sorted(
                load.tallies.items(), key=lambda item: (item[0][0], item[0][1] == "eval")
            )
        ]
        rejects = sorted(load.rejects.items(), key=lambda item: -item[1])
        return Counts(
            num_input_rows=load.num_input_rows,
            num_read=load.num_read,
            num_units=load.num_units,
            splits=tuple(splits),
            num_targets=round(load.num_targets),
            num_trained=sum(split.num_trained for split in splits),
            targets_interval=self._interval(load.num_targets),
            rejects=tuple(RejectCount(domain=d, reason=reason, num_rows=round(num)) for (d, reason), num in rejects),
            num_to_answer=round(load.num_questions),
        )

    def _interval(self, value: float) -> Interval | None:
        """95%, by the spread of the rows' targets; of anything that grows with them."""
        if self.load.num_read == self.load.num_input_rows:
            return None
        part = 1.96 * sqrt(self.load.variance) / self.load.num_targets
        return Interval(low=value * max(0.0, 1 - part), high=value * (1 + part))

    def _storage(self) -> Storage:
        targets = self.seen.config.targets
        sizes = self._typical(targets)
        if self.measured:
            sizes |= joined_hidden(self.measured.bytes_per_token)
        columns = self._columns(sizes)
        shards, vocab_size, dim = sum(columns.values()), self.seen.vocab_size, self._hidden_size
        rank = typical_rank(targets.hidden_bytes, dim)
        return Storage(
            columns={name: round(size) for name, size in columns.items()},
            shards=round(shards),
            shards_interval=self._interval(shards),
            projection=2 * rank * vocab_size + 4 * (vocab_size + dim + rank * (dim + 1)) if rank else 0,
            fidelity=2 * calibration.NUM_FIDELITY * vocab_size if rank else 0,
            bytes_per_target=shards / self.load.num_targets,
            source="measured" if self.measured else "typical",
        )

    def _columns(self, sizes: dict[str, float]) -> dict[str, float]:
        """Bytes of every column, in a table's order. ``sizes``: the teacher's, for a target whose beginning is new."""
        known = {name: size for name, size in self.load.bytes.items() if name != "footers"}
        teachers = {name: size * self.load.num_distinct for name, size in sizes.items()}
        return {**known, **teachers, "footers": self.load.bytes["footers"]}

    def _typical(self, targets: TargetsConfig) -> dict[str, float]:
        heads = kept_heads(self.seen.model.get_text_config(), targets)
        return typical_bytes(targets, vocab_size=self.seen.vocab_size, hidden_size=self._hidden_size, heads=heads)

    def _memory(self, sizes: Anatomy) -> Memory:
        return memory_of(
            sizes,
            config=self.seen.config,
            engine=self.engine,
            vocab_size=self.seen.vocab_size,
            dtype=held_dtype(self.seen.model, self.seen.config.dtype),
            machine=self.machine,
        )

    def _flops(self, sizes: Anatomy) -> Flops:
        rank = typical_rank(self.seen.config.targets.hidden_bytes, sizes.hidden_size)
        context = self.load.num_attended / self.load.num_targets
        return flops_of(sizes, vocab_size=self.seen.vocab_size, rank=rank, context=context)

    def _num_tokens(self) -> float:
        """Targets, and those of the calibration pass."""
        config, train = self.seen.config, [t for (_, split), t in self.load.tallies.items() if split == "train"]
        trained = sum(tally.num_trained for tally in train)
        if not config.targets.hidden_bytes or not trained:
            return self.load.num_targets
        wanted = config.calibration_tokens or calibration.TOKENS_PER_DIMENSION * self._hidden_size
        share = min(1.0, wanted / trained)
        return self.load.num_targets + share * sum(tally.num_targets for tally in train)

    def _proposal(self, sizes: Anatomy | None, memory: Memory | None) -> Proposal | None:
        chosen, batch = None, None
        reasons: list[str] = []
        if self.measured:
            found = choices(
                self.measured,
                self.seen.config.targets,
                typical=self._typical,
                on_disk=lambda sizes: sum(self._columns(sizes).values()) / self.load.num_targets,
            )
            chosen, why = best_choice(found)
            reasons += why
        if sizes and memory and self.machine.gpu_memory is not None:
            batch = largest_batch(sizes, memory, config=self.seen.config, gpu_memory=self.machine.gpu_memory)
            if batch is not None:
                reasons.append(
                    f"max_num_batched_tokens {batch}: the largest power of two up to 16,384 whose KV cache and "
                    f"activations fit beside the weights ({memory.dtype}) and the LM head's chunk"
                )
        if not reasons:
            return None
        return Proposal(
            top_k=chosen.top_k if chosen else None,
            hidden_bytes=chosen.hidden_bytes if chosen else None,
            bytes_per_target=chosen.bytes_per_target if chosen else None,
            max_num_batched_tokens=batch,
            reasons=tuple(reasons),
        )

    def _notes(self, memory: Memory | None) -> Iterator[str]:
        if self.measured:
            wanted = self.seen.config.calibration_tokens or calibration.TOKENS_PER_DIMENSION * self._hidden_size
            yield (
                f"the projection was fitted to {self.measured.num_fit_tokens:,} tokens of other sequences, in a real "
                f"run to up to {wanted:,}: the distances of low-rank targets lean to the high side"
            )
        else:
            yield (
                "sizes of the teacher's columns are those of a trained teacher on ordinary text (docs/planning.md); "
                "--measure takes this teacher's own"
            )
        if self.load.num_questions:
            yield (
                "the teacher writes the answers itself: they are counted at their longest, and the time of writing "
                "them is not in the cost"
            )
        if memory is None:
            yield "memory and FLOPs are left out: the teacher is built otherwise than the decoders that are known"
        elif self.machine.gpu_memory is not None and all(
            w.tensor_parallel_size is None for w in memory.weights if w.dtype == memory.dtype
        ):
            yield f"the teacher does not fit 64 such GPUs in {memory.dtype}, or none of their numbers divides its heads"
