"""Held-out positions with the teacher's whole distribution flow in; how far each kind of target is from it flows out.

``fidelity.safetensors`` holds, for N positions, ``logprobs`` [N, V] float16 at T=1 and the targets that the cache would
keep of them, by their usual names. So a cache states its own error, whatever the size of its teacher.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.cache import storage, tensors
from distill.cache.projection import Projection
from distill.cache.reader import CacheReader
from distill.cache.tail import Kind, rebuild, total_variation
from distill.errors import CorruptionError

FILE_NAME = "fidelity.safetensors"
_CHUNK = 32  # positions whose distributions exist at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureFidelity:
    """Mean total variation to the teacher at one temperature for each kind of target; None without a projection."""

    temperature: float
    low_rank: float | None
    bucket: float
    renormalised: float


def measure(reader: CacheReader) -> tuple[int, tuple[TemperatureFidelity, ...]]:
    """Number of positions, and the error at each temperature; nothing where the cache has no such file.

    Raises CorruptionError when the file is damaged.
    """
    path = storage.inside(reader.root, FILE_NAME)
    if not path.exists():
        return 0, ()
    arrays = _load(path)
    temperatures = [
        _at_temperature(arrays, reader.projection, index=index, temperature=temperature)
        for index, temperature in enumerate(reader.temperatures)
    ]
    return len(arrays["logprobs"]), tuple(temperatures)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    arrays, _ = tensors.load(storage.read(path), name=str(path))
    for name in ("logprobs", "topk_ids", "topk_logprobs", "log_z", "log_tail"):
        if name not in arrays or len(arrays[name]) != len(arrays["logprobs"]):
            raise CorruptionError(f"{path} does not hold '{name}' for every position. Restore it from a copy.")
    return arrays


def _at_temperature(
    arrays: dict[str, NDArray[Any]], projection: Projection | None, *, index: int, temperature: float
) -> TemperatureFidelity:
    num = len(arrays["logprobs"])
    chunks = [slice(start, start + _CHUNK) for start in range(0, num, _CHUNK)]
    kinds: tuple[Kind, ...] = ("low_rank", "bucket", "renormalised")
    distances: dict[Kind, list[NDArray[np.float64]]] = {kind: [] for kind in kinds}
    for chunk in chunks:
        scaled_NV = arrays["logprobs"][chunk].astype(np.float64) / temperature
        scaled_NV -= scaled_NV.max(axis=1, keepdims=True)
        truth_NV = np.exp(scaled_NV)
        truth_NV /= truth_NV.sum(axis=1, keepdims=True)
        tail_logits_NV = np.zeros(truth_NV.shape, np.float32)
        if projection is not None:
            hidden = {bits: arrays[f"hidden_{bits}"][chunk] for bits, _ in projection.widths}
            tail_logits_NV = projection.tail_logits(projection.dequantise(hidden))
        for kind in kinds[0 if projection is not None else 1 :]:
            rebuilt_NV = rebuild(
                kind,
                temperature=temperature,
                topk_ids_NK=arrays["topk_ids"][chunk],
                topk_logprobs_NK=arrays["topk_logprobs"][chunk],
                log_z_N=arrays["log_z"][chunk, index],
                log_tail_N=arrays["log_tail"][chunk, index],
                tail_logits_NV=tail_logits_NV,
            )
            distances[kind].append(total_variation(rebuilt_NV, truth_NV))
    means = {kind: float(np.concatenate(parts).mean()) for kind, parts in distances.items() if parts}
    return TemperatureFidelity(
        temperature=temperature,
        low_rank=means.get("low_rank"),
        bucket=means["bucket"],
        renormalised=means["renormalised"],
    )
