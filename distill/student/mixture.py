"""Share schedules flow in, the domain of every sequence of a stage flows out.

Which domain supplies sequence n is a pure function of n: the one that has fallen furthest behind its schedule. So the
realised share is never more than about one sequence off, and a resumed run only recomputes an array of small integers.

``N`` sequences of the stage, ``D`` domains.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from distill.config import ShareConfig
from distill.errors import UsageError

BLOCK = 2**16  # sequences whose shares are computed at a time


def share_at(share: ShareConfig, progress_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share, before normalisation, at each progress p in [0, 1).

    constant: start; linear: start + (end - start) p; cosine: start + (end - start) (1 - cos πp) / 2;
    step: start while p < at, end from there on.
    """
    end = share.start if share.end is None else share.end
    rise_N = {
        "constant": np.zeros_like(progress_N),
        "linear": progress_N,
        "cosine": (1 - np.cos(np.pi * progress_N)) / 2,
        "step": (progress_N >= share.at).astype(np.float64),
    }[share.schedule]
    return share.start + (end - share.start) * rise_N


def scheduled_shares(shares: Mapping[str, ShareConfig], progress_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Normalised shares at each progress: [N, D], rows sum to 1. Raises UsageError where all shares are 0."""
    shares_ND = np.stack([share_at(share, progress_N) for share in shares.values()], axis=1)
    sums_N = shares_ND.sum(axis=1)
    if (sums_N <= 0).any():
        raise UsageError(
            f"the shares of {', '.join(shares)} are all 0 at {progress_N[np.argmin(sums_N)]:.0%} of the stage, so no "
            "domain could supply a sequence. Give at least one of them a share above 0 at every time."
        )
    normalised: NDArray[np.float64] = shares_ND / sums_N[:, None]
    return normalised


def has_share(share: ShareConfig) -> bool:
    """Whether the domain ever supplies a sequence."""
    return bool(share_at(share, np.linspace(0, 1, 1001)).max() > 0)


def assign_domains(shares: Mapping[str, ShareConfig], num_sequences: int) -> NDArray[np.uint16]:
    """For each sequence of the stage the number of its domain in ``shares``: [N].

    Sequence n goes to the domain with the largest ``Σ_{m <= n} share_d(m / N) - (sequences d has had)``; the first of
    equals. ``share_d`` is normalised.
    """
    assigned = np.zeros(num_sequences, np.uint16)
    if len(shares) == 1:
        return assigned
    deficits = [0.0] * len(shares)
    for start in range(0, num_sequences, BLOCK):
        stop = min(start + BLOCK, num_sequences)
        shares_ND = scheduled_shares(shares, np.arange(start, stop) / num_sequences)
        assigned[start:stop], deficits = follow(shares_ND, deficits)
    return assigned


def follow(shares_ND: NDArray[np.float64], deficits: list[float]) -> tuple[NDArray[np.uint16], list[float]]:
    """The choice for each of N more sequences, as in ``assign_domains``, and how far each of D has fallen behind then.

    ``deficits`` says how far each has fallen behind before.
    """
    chosen_N = np.zeros(len(shares_ND), np.uint16)
    for n, row in enumerate(shares_ND.tolist()):
        deficits = [deficit + share for deficit, share in zip(deficits, row, strict=True)]
        chosen = deficits.index(max(deficits))
        deficits[chosen] -= 1.0
        chosen_N[n] = chosen
    return chosen_N, deficits
