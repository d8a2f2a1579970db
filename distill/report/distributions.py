"""A cache's rows flow in, the distributions that a report draws flow out.

A large cache is sampled: at most ``UNITS_PER_DOMAIN`` units of each domain, spread evenly over it. Whole units are
read and let go one after the other.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill.cache.plan import Commit
from distill.cache.reader import CacheReader
from distill.report.extras import read_rejects

UNITS_PER_DOMAIN = 8
_COLUMNS = ["loss_mask", "topk_logprobs", "log_z", "entropy"]
_NUMBER = re.compile(r"\d[\d,.]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distributions:
    """What the sampled rows look like.

    ``mass_TK[j, i]`` is the teacher's mean mass inside the i + 1 likeliest ids at the j-th temperature. ``entropy`` is
    that of trained targets, in nats; ``lengths`` counts the tokens of sequences.
    """

    num_targets: int
    num_sampled_units: int
    mass_TK: NDArray[np.float64]  # [n_T, k]
    entropy: dict[str, NDArray[np.float32]]  # domain -> [trained targets]
    lengths: dict[str, NDArray[np.int64]]  # domain -> [sequences]
    rejects: tuple[tuple[str, int], ...]  # reason with its numbers as N, rows; most frequent first


def sample(reader: CacheReader) -> Distributions:
    """The distributions of ``reader``'s rows. Raises CorruptionError when what is read is damaged."""
    mass_TK = np.zeros((len(reader.temperatures), reader.top_k))
    entropy: dict[str, list[NDArray[np.float32]]] = {domain: [] for domain in reader.domains}
    lengths: dict[str, list[NDArray[np.int64]]] = {domain: [] for domain in reader.domains}
    num_targets = 0
    picked = [commit for domain in reader.domains for commit in _spread(reader.units(domain))]
    for commit in picked:
        for batch in reader.read_unit(commit, columns=_COLUMNS).to_batches():
            masks = batch.column("loss_mask")
            mask_N = masks.flatten().to_numpy(zero_copy_only=False)
            entropy[commit.domain].append(batch.column("entropy").flatten().to_numpy()[mask_N])
            lengths[commit.domain].append(np.diff(masks.offsets.to_numpy()).astype(np.int64) + 1)
            mass_TK += _mass(batch, reader)
            num_targets += len(mask_N)
    return Distributions(
        num_targets=num_targets,
        num_sampled_units=len(picked),
        mass_TK=np.cumsum(mass_TK, axis=1) / max(num_targets, 1),
        entropy={domain: np.concatenate(parts) for domain, parts in entropy.items() if parts},
        lengths={domain: np.concatenate(parts) for domain, parts in lengths.items() if parts},
        rejects=_rejects(reader),
    )


def _spread(commits: tuple[Commit, ...]) -> list[Commit]:
    filled = [commit for commit in commits if commit.num_targets.total]
    if not filled:
        return []
    return [filled[i] for i in np.unique(np.linspace(0, len(filled) - 1, UNITS_PER_DOMAIN).astype(int))]


def _mass(batch: pa.RecordBatch, reader: CacheReader) -> NDArray[np.float64]:
    """Sum over positions of the mass of each rank at each temperature: [n_T, k]."""
    logprobs_NK = batch.column("topk_logprobs").flatten().to_numpy().reshape(-1, reader.top_k)
    log_z_NT = batch.column("log_z").flatten().to_numpy().reshape(-1, len(reader.temperatures))
    return np.stack(
        [
            np.exp(logprobs_NK / np.float32(temperature) - log_z_NT[:, [index]]).sum(axis=0, dtype=np.float64)
            for index, temperature in enumerate(reader.temperatures)
        ]
    )


def _rejects(reader: CacheReader) -> tuple[tuple[str, int], ...]:
    """Reasons often name a row's own numbers; without these they can be counted."""
    reasons = Counter(_NUMBER.sub("N", reject.reason) for reject in read_rejects(reader))
    return tuple(reasons.most_common())
