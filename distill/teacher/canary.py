"""A few sequences flow in, and with each unit flow through the teacher again: a teacher that drifts is stopped.

Weights do not change and neither may the numbers, but machines fail without saying so: memory flips, a cache of keys
and values goes stale, a device overheats. So some sequences are captured at the start, twice, once together and once
one by one, which tells how much batching alone moves the numbers. Every unit then captures them again among its own.
The first worker's numbers stay in the cache (``canaries.safetensors``), so that a later worker whose teacher is off
from the start is stopped as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.cache import tensors
from distill.cache.plan import Unit
from distill.cache.writer import CacheWriter
from distill.errors import CorruptionError
from distill.records import Prompt, Question, Reject, Targets
from distill.teacher.engine import Engine

CANARIES_FILE = "canaries.safetensors"
NUM, _LENGTH = 3, 128  # sequences, and tokens of each
# A drift is an alarm beyond so many times the noise, and never below what rounding to a shard's precision makes.
_TIMES, _TIMES_ELSEWHERE = 8.0, 40.0  # in one process; on another machine, whose kernels may add up in another order
_SMALLEST = 2e-3
_SMALLEST_ELSEWHERE = 0.05  # what bfloat16 may do between two kinds of GPU
Kept = dict[str, NDArray[Any]]  # by names of ``Targets``


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A sequence whose targets are known."""

    prompt: Prompt
    known: Kept
    tolerance: float  # of ``drift``

    def check(self, targets: Targets, unit: Unit) -> None:
        """Raises CorruptionError when the teacher has left other targets than before."""
        found = drift(self.known, kept(targets))
        if not found <= self.tolerance:
            raise CorruptionError(
                f"the teacher has drifted: in unit {unit.unit} a sequence that it had read before came out {found:.3g} "
                f"off, and only {self.tolerance:.3g} can be noise. The unit is not committed, and what was committed "
                "before was checked. Check the machine (GPU memory errors, temperature), then run the same command "
                "again."
            )


def choose(items: Iterator[Prompt | Question]) -> list[Prompt]:
    """The first few different sequences, cut short. Their words do not matter, so questions serve as well."""
    chosen: dict[str, Prompt] = {}
    for item in items:
        ids = item.input_ids[:_LENGTH]
        if len(ids) < 2 or item.prompt_id in chosen:
            continue
        chosen[item.prompt_id] = Prompt(
            sequence_id=f"canary {item.prompt_id}",
            prompt_id=item.prompt_id,
            domain=item.domain,
            split=item.split,
            source=item.source,
            prompt="",
            response="",
            input_ids=ids,
            loss_mask=np.ones(len(ids) - 1, bool),
        )
        if len(chosen) == NUM:
            break
    return list(chosen.values())


def release(engine: Engine, prompts: Sequence[Prompt], writer: CacheWriter) -> list[Canary]:
    """Captures the sequences, measures the noise, and compares with the worker that began the cache.

    Raises CorruptionError when this teacher's numbers are not those of that worker.
    """
    if not prompts:
        return []
    together = {ordinal: kept(targets) for ordinal, targets in engine.capture(prompts)}
    alone = [kept(targets) for prompt in prompts for _, targets in engine.capture([prompt])]
    noise = max(drift(together[n], known) for n, known in enumerate(alone))
    tolerance = max(_SMALLEST, _TIMES * noise)
    canaries = [Canary(prompt=p, known=together[n], tolerance=tolerance) for n, p in enumerate(prompts)]
    _compare_with_first(canaries, noise, writer)
    return canaries


def _compare_with_first(canaries: Sequence[Canary], noise: float, writer: CacheWriter) -> None:
    arrays = {f"{n}/{name}": values for n, canary in enumerate(canaries) for name, values in canary.known.items()}
    arrays |= {f"{n}/input_ids": canary.prompt.input_ids for n, canary in enumerate(canaries)}
    stored = writer.put_once(CANARIES_FILE, tensors.dump(arrays, {"noise": repr(noise)}))
    where = f"{writer.root}/{CANARIES_FILE}"
    first, metadata = tensors.load(stored, name=where)
    try:
        tolerance = max(_SMALLEST_ELSEWHERE, _TIMES_ELSEWHERE * max(noise, float(metadata["noise"])))
        drifts = [_drift_from(first, n, canary) for n, canary in enumerate(canaries)]
    except (KeyError, ValueError, IndexError) as error:
        raise CorruptionError(f"{where} lacks or garbles {error}. Restore it from a copy, or delete it.") from error
    for found in drifts:
        if not found <= tolerance:
            raise CorruptionError(
                f"{where}: the same sequence comes out {found:.3g} off from what "
                f"the worker that began this cache got of it, and only {tolerance:.3g} can be noise. Nothing was "
                "written. Check this machine's GPU, its vllm and engine_options against the other worker's."
            )


def _drift_from(first: Kept, n: int, canary: Canary) -> float:
    """How far a canary is from what the first worker's file holds of it; 0 where that drew another sequence."""
    ids = first.get(f"{n}/input_ids")
    if ids is None or not np.array_equal(ids, canary.prompt.input_ids):
        return 0.0
    return drift({name: first[f"{n}/{name}"] for name in canary.known}, canary.known)


def kept(targets: Targets) -> Kept:
    """What of a sequence's targets is compared."""
    return {"topk_ids": targets.topk_ids, "topk_logprobs": targets.topk_logprobs, "log_z": targets.log_z}


def drift(before: Kept, after: Kept) -> float:
    """How far two captures of one sequence are apart; 0 when they are equal, NaN when one has a NaN.

    The larger of two means over positions: the total variation of what the top-k hold at T=1, and the largest change of
    ``log_z``.
    """
    now, then = (np.exp(known["topk_logprobs"].astype(np.float64)) for known in (after, before))
    same_NKK = before["topk_ids"][:, :, None] == after["topk_ids"][:, None, :]
    matched = np.einsum("nij,nj->ni", same_NKK, now)  # makes no float of each comparison: k may be a thousand
    variation_N = 0.5 * (np.abs(then - matched).sum(1) + now.sum(1) - matched.sum(1))
    change_N = np.abs(before["log_z"].astype(np.float64) - after["log_z"]).max(1)
    return float(np.maximum(variation_N.mean(), change_N.mean()))


def with_canaries(
    items: Iterator[Prompt | Question | Reject], canaries: Sequence[Canary]
) -> Iterator[Prompt | Question | Reject | Canary]:
    """The canaries first, then what a unit's rows are."""
    yield from canaries
    yield from items
