"""A loaded teacher and drawn sequences flow in, what its targets are worth and what they cost flows out.

Meant for some thousand tokens before a cache is paid for. Targets of many k and many sizes of the hidden state are
rebuilt by the reference of ``distill.cache.tail`` and compared with the teacher's whole distribution, on sequences that
the projection was not fitted to. Fewer tokens fit it than in a real run, so the low-rank figures lean to the high side.

``N`` positions, ``D`` hidden size, ``V`` vocabulary, ``K`` top-k.
"""

import io
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from distill.cache.codec import ROUNDING, rounded
from distill.cache.projection import Projection, choose_widths
from distill.cache.schema import Layout
from distill.cache.shard import write_rows
from distill.cache.sizes import column_bytes, num_distinct
from distill.cache.tail import Kind, rebuild, total_variation
from distill.config import TargetsConfig
from distill.errors import DataError
from distill.records import Prompt, SequenceTargets
from distill.teacher import calibration
from distill.teacher.engine import Engine

TOP_KS = (16, 32, 64, 128)
HIDDEN_BYTES = (64, 128, 256)
FIT_SHARE = 4  # tokens that fit the projection for each one that is measured
_MOST_COMPARED = 96  # positions at which targets are rebuilt: each takes as many passes over the vocabulary as choices
_OF_TEACHER = ("topk_", "log_", "hidden_", "entropy", "sampled_", "layer")  # columns
_CHUNK = 32  # positions whose distributions exist at the same time


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mass(_Model):
    """What the likeliest ids hold."""

    temperature: float
    top_k: int
    mass: float = Field(description="the teacher's mean mass inside the top_k likeliest ids")


class Distance(_Model):
    """How far one kind of target is from the teacher."""

    kind: Kind
    temperature: float
    top_k: int
    hidden_bytes: int = Field(description="0 where the kind needs no hidden state")
    total_variation: float = Field(description="mean over positions; 0: the same, 1: nothing in common")


class Measured(_Model):
    """What a teacher left for a few sequences."""

    num_tokens: int = Field(description="targets that were captured and timed")
    num_trained: int = Field(description="trained ones among them, of which masses are means")
    num_compared: int = Field(description="positions of which distances are means")
    num_fit_tokens: int = Field(description="trained targets of other sequences, which fitted the projection")
    masses: tuple[Mass, ...]
    distances: tuple[Distance, ...]
    bytes_per_token: dict[str, float] = Field(description="column -> bytes for a target whose beginning is new")
    capture_tokens_per_s: float = Field(description="capture, everything that is kept included")
    prefill_tokens_per_s: float = Field(description="the same sequences through the layers alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Sequences to measure on, and others to fit the projection to."""

    measured: Sequence[Prompt]
    fit: Sequence[Prompt]


def divide(prompts: Sequence[Prompt], *, num_tokens: int) -> Drawn:
    """The first sequences with ``num_tokens`` trained targets, at most half of them; the others fit.

    Raises DataError when there are fewer than two.
    """
    if len(prompts) < 2:
        raise DataError(
            f"measuring needs at least two training sequences, one to fit the projection and one to try it on, and the "
            f"data has {len(prompts)}. Give more data, or plan without --measure."
        )
    sums = np.cumsum([prompt.loss_mask.sum() for prompt in prompts])
    num = min(int(np.searchsorted(sums, num_tokens)) + 1, len(prompts) // 2)
    return Drawn(measured=prompts[:num], fit=prompts[num:])


def measure(engine: Engine, drawn: Drawn, *, targets: TargetsConfig, seed: int) -> Measured:
    """Masses, distances, bytes and rates of ``engine`` on ``drawn.measured``. RetryError when the engine dies."""
    widest = calibration.fit(engine, drawn.fit, hidden_bytes=max(*HIDDEN_BYTES, targets.hidden_bytes))
    layers = calibration.fit_layers(engine, drawn.fit, layers=targets.layers, layer_bytes=targets.layer_bytes)
    widest = replace(widest, layers=layers)
    engine.install(narrowed(widest, targets.hidden_bytes) if targets.hidden_bytes else None)
    rows, capture_s = _capture(engine, drawn.measured)
    started = time.perf_counter()
    hidden = dict(engine.hidden_states(drawn.measured))
    prefill_s = time.perf_counter() - started
    hidden_ND = np.concatenate([hidden[i][prompt.loss_mask] for i, prompt in enumerate(drawn.measured)])
    np.random.default_rng(seed).shuffle(hidden_ND)
    num_tokens = sum(prompt.num_targets for prompt in drawn.measured)
    found = _compare(engine, hidden_ND, widest=widest, targets=targets)
    return Measured(
        num_tokens=num_tokens,
        num_trained=len(hidden_ND),
        num_compared=min(len(hidden_ND), _MOST_COMPARED),
        num_fit_tokens=sum(int(prompt.loss_mask.sum()) for prompt in drawn.fit),
        masses=found.masses(),
        distances=found.distances(),
        bytes_per_token=_bytes_per_token(rows, targets),
        capture_tokens_per_s=num_tokens / capture_s,
        prefill_tokens_per_s=num_tokens / prefill_s,
    )


def narrowed(projection: Projection, hidden_bytes: int) -> Projection:
    """The projection that the same moments give for fewer bytes: its coordinates are the first ones of the wider."""
    widths = choose_widths(projection.variance_R.astype(np.float64), budget_bits=8 * hidden_bytes)
    rank = sum(count for _, count in widths)
    share = float(projection.variance_R[:rank].sum() / projection.variance_R.sum())
    return replace(
        projection,
        down_RD=projection.down_RD[:rank],
        basis_VR=projection.basis_VR[:, :rank],
        variance_R=projection.variance_R[:rank],
        widths=widths,
        explained=projection.explained * share,
    )


def _capture(engine: Engine, prompts: Sequence[Prompt]) -> tuple[list[SequenceTargets], float]:
    """The rows that a cache would hold, and the seconds that they took once everything was compiled."""
    for _ in engine.capture(prompts[:1]):
        pass
    started = time.perf_counter()
    captured = dict(engine.capture(prompts))
    seconds = time.perf_counter() - started
    return [SequenceTargets(prompt=prompt, targets=captured[i]) for i, prompt in enumerate(prompts)], seconds


def _bytes_per_token(rows: Sequence[SequenceTargets], targets: TargetsConfig) -> dict[str, float]:
    """Of the columns that hold the teacher's numbers, written as a shard."""
    first = rows[0].targets
    layout = Layout(
        top_k=targets.top_k,
        temperatures=targets.temperatures,
        widths=tuple((bits, values.shape[1]) for bits, values in first.hidden.items()),
        num_samples=targets.num_samples,
        layer_columns=tuple((name, values.shape[1]) for name, values in first.layers.items()),
    )
    file = io.BytesIO()
    write_rows(file, rows, layout)
    sizes = column_bytes(pq.read_metadata(file))
    num = num_distinct([row.prompt.input_ids for row in rows], top_k=targets.top_k)
    return {name: size / num for name, size in sizes.items() if name.startswith(_OF_TEACHER)}


class _Found:
    """Masses and distances, chunk by chunk of positions."""

    def __init__(self, *, top_ks: Sequence[int], temperatures: Sequence[float]) -> None:
        self._top_ks, self._temperatures = top_ks, temperatures
        self._masses: dict[tuple[float, int], list[NDArray[np.float64]]] = defaultdict(list)
        self._distances: dict[tuple[Kind, float, int, int], list[NDArray[np.float64]]] = defaultdict(list)

    def add(self, logprobs_NV: NDArray[np.float64], tails: dict[int, NDArray[np.float32]]) -> None:
        """Adds positions by their whole distributions; without ``tails`` (hidden bytes -> logits) no distances."""
        likeliest_NK = _likeliest(logprobs_NV, self._top_ks[-1])
        for temperature in self._temperatures:
            log_probs_NV = logprobs_NV / temperature
            log_z_N = _log_sum(log_probs_NV)
            log_probs_NV -= log_z_N[:, None]
            inside_NK = np.exp(np.take_along_axis(log_probs_NV, likeliest_NK, axis=1)).cumsum(axis=1)
            for k in self._top_ks:
                self._masses[temperature, k].append(inside_NK[:, k - 1])
            if tails:
                truth = _Truth(logprobs_NV=logprobs_NV, probs_NV=np.exp(log_probs_NV), log_z_N=log_z_N, T=temperature)
                for k in self._top_ks:
                    for kind, size, distance_N in _distances(truth, likeliest_NK[:, :k], tails):
                        self._distances[kind, temperature, k, size].append(distance_N)

    def masses(self) -> tuple[Mass, ...]:
        """Means over all positions."""
        return tuple(Mass(temperature=T, top_k=k, mass=_mean(parts)) for (T, k), parts in self._masses.items())

    def distances(self) -> tuple[Distance, ...]:
        """Means over the positions with tails."""
        return tuple(
            Distance(kind=kind, temperature=T, top_k=k, hidden_bytes=size, total_variation=_mean(parts))
            for (kind, T, k, size), parts in self._distances.items()
        )


def _compare(engine: Engine, hidden_ND: NDArray[np.float32], *, widest: Projection, targets: TargetsConfig) -> _Found:
    """Masses at all positions, distances at the first of them."""
    sizes = sorted({*HIDDEN_BYTES, *([targets.hidden_bytes] if targets.hidden_bytes else [])})
    projections = {size: narrowed(widest, size) for size in sizes}
    top_ks = [k for k in sorted({*TOP_KS, targets.top_k}) if k < len(widest.bias_V)]
    found = _Found(top_ks=top_ks, temperatures=targets.temperatures)
    for start in range(0, len(hidden_ND), _CHUNK):
        chunk_ND = hidden_ND[start : start + _CHUNK]
        near = start < _MOST_COMPARED
        tails = {size: _tail_logits(kept, chunk_ND) for size, kept in projections.items()} if near else {}
        found.add(engine.head_logprobs(chunk_ND).astype(np.float64), tails)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Truth:
    """The teacher's whole distribution at some positions: at T=1, and at ``T``."""

    logprobs_NV: NDArray[np.float64]
    probs_NV: NDArray[np.float64]
    log_z_N: NDArray[np.float64]
    T: float


def _distances(
    truth: _Truth, ids_NK: NDArray[np.int64], tails: dict[int, NDArray[np.float32]]
) -> Iterator[tuple[Kind, int, NDArray[np.float64]]]:
    """(kind, hidden bytes, total variation [N]) of every target that these ids and tails make."""
    outside_NV = truth.probs_NV.copy()
    np.put_along_axis(outside_NV, ids_NK, 0.0, axis=1)
    log_tail_N = np.log(np.maximum(outside_NV.sum(axis=1), 1e-40))
    logprobs_NK = np.take_along_axis(truth.logprobs_NV, ids_NK, axis=1)
    any_tail = next(iter(tails.values()))
    choices: list[tuple[Kind, int, NDArray[np.float32]]] = [("renormalised", 0, any_tail), ("bucket", 0, any_tail)]
    choices += [("low_rank", size, tail_NV) for size, tail_NV in tails.items()]
    for kind, size, tail_NV in choices:
        rebuilt_NV = rebuild(
            kind,
            temperature=truth.T,
            topk_ids_NK=ids_NK.astype(np.int32),
            topk_logprobs_NK=rounded(logprobs_NK, ROUNDING["topk_logprobs"]),
            log_z_N=truth.log_z_N,
            log_tail_N=log_tail_N,
            tail_logits_NV=tail_NV,
        )
        yield kind, size, total_variation(rebuilt_NV, truth.probs_NV)


def _tail_logits(projection: Projection, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits from coordinates that went through the quantiser, as a student's are."""
    coords_NR = (hidden_ND - projection.mean_D) @ projection.down_RD.T
    return projection.tail_logits(projection.dequantise(projection.quantise(coords_NR)))


def _likeliest(logprobs_NV: NDArray[np.float64], num: int) -> NDArray[np.int64]:
    """Ids of the ``num`` largest of each row, sorted downwards: [N, num]."""
    picked_NK = np.argpartition(-logprobs_NV, num - 1, axis=1)[:, :num]
    order_NK = np.argsort(-np.take_along_axis(logprobs_NV, picked_NK, axis=1), axis=1, kind="stable")
    return np.take_along_axis(picked_NK, order_NK, axis=1)


def _log_sum(values_NV: NDArray[np.float64]) -> NDArray[np.float64]:
    top_N1 = values_NV.max(axis=1, keepdims=True)
    sums_N: NDArray[np.float64] = np.log(np.exp(values_NV - top_N1).sum(axis=1)) + top_N1[:, 0]
    return sums_N


def _mean(parts: Sequence[NDArray[np.float64]]) -> float:
    return float(np.concatenate(parts).mean())
