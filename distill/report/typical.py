"""What is kept for a position flows in, the bytes that it typically takes on disk flow out, column by column.

These columns hold the teacher's numbers, which a plan does not have. Their sizes per value are constants, each measured
on the cache of a trained teacher (SmolLM2-135M-Instruct, V = 49,152) of two texts: this project's documents (23,879
targets; k = 16, 64, 256) and its example questions (40,010 targets; k = 64), 2026-11-24, after zstd, per position whose
beginning is new. ``distill plan --measure`` takes a teacher's own instead.
"""

from collections.abc import Sequence

import numpy as np

from distill.cache.plan import Heads
from distill.config import TargetsConfig

# An id is four bytes, of which zstd's entropy coder sees no order: this share of what random ids would take.
_ID_SHARES = {16: 0.67, 64: 0.77, 256: 0.83}
_LOGPROB = {16: 1.62, 64: 1.33, 256: 1.02}  # bytes for each: the further down, the closer together
_LOG_Z = 2.7  # for each temperature but 1, where it is always 0
_LOG_TAIL = 1.6  # for each temperature
_ENTROPY = 2.1
_HIDDEN = 0.93  # of the bytes asked for: coordinates of two bits hardly shrink, those of four and eight a little
# Layers 5, 15, 25 of the same teacher and one to three heads of each, on 25 pieces of the documents and 40 questions.
_INNER = 0.93  # layer<i>_hidden, for each byte: 0.91 to 0.97; layer 0 takes less, where words come again
_QUERY, _KEY = 0.77, 0.82  # layer<i>_q, layer<i>_k: a few coordinates of a head are far larger than the others
_SCALE = 3.05  # layer<i>_…_scale, a float that is not rounded: 2.96 to 3.28
_COUNT = 0.5  # sampled_counts: small integers, most of them 1; not yet measured
# Different ids among n draws: 4.2 of 8, 10.5 of 32, 24.8 of 128, 37 of 256 (128 positions of the same teacher).
_DISTINCT, _DISTINCT_POWER = 1.15, 0.63


def typical_bytes(
    targets: TargetsConfig, *, vocab_size: int, hidden_size: int, heads: Sequence[Heads] = ()
) -> dict[str, float]:
    """Column -> bytes for a position. ``hidden`` stands for all widths; ``heads`` are those that ``targets`` names."""
    k, num_temperatures = targets.top_k, len(targets.temperatures)
    id_bytes = random_id_bytes(vocab_size) * _at(_ID_SHARES, k)
    sizes = {
        "topk_ids": k * id_bytes,
        "topk_logprobs": k * _at(_LOGPROB, k),
        "log_z": _LOG_Z * (num_temperatures - (1.0 in targets.temperatures)),
        "log_tail": _LOG_TAIL * num_temperatures,
        "hidden": _HIDDEN * min(targets.hidden_bytes, hidden_size),
        "entropy": _ENTROPY,
    }
    if targets.num_samples:
        num_ids = min(targets.num_samples, _DISTINCT * targets.num_samples**_DISTINCT_POWER)
        sizes |= {"sampled_ids": num_ids * id_bytes, "sampled_counts": num_ids * _COUNT}
    sizes |= {f"layer{layer}_hidden": _INNER * targets.layer_bytes for layer in targets.layers}
    for kept in heads:
        for side, num_heads, size in (("q", len(kept.heads), _QUERY), ("k", len(kept.kv_heads), _KEY)):
            sizes[f"layer{kept.layer}_{side}"] = size * num_heads * kept.head_dim
            sizes[f"layer{kept.layer}_{side}_scale"] = _SCALE * num_heads
    return {name: size for name, size in sizes.items() if size}


def typical_rank(hidden_bytes: int, hidden_size: int) -> int:
    """Coordinates in so many bytes: most have two bits (448 in 128 bytes, measured as above), one has eight at most."""
    return min(int(3.5 * hidden_bytes), hidden_size)


def random_id_bytes(vocab_size: int) -> float:
    """Bytes for an id drawn evenly from the vocabulary: the entropy of its four bytes, coded alike."""
    ids = np.arange(vocab_size, dtype="<i4").view(np.uint8)
    shares = np.bincount(ids, minlength=256) / len(ids)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum() / 2)


def _at(table: dict[int, float], k: int) -> float:
    """Between the measured k by the logarithm of k, beyond them the nearest."""
    return float(np.interp(np.log(k), np.log(list(table)), list(table.values())))
