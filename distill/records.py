"""What flows: a row of data becomes a ``Prompt``, the teacher turns it into a ``SequenceTargets``, the cache keeps it.

    file row -> Prompt | Question | Reject -> engine -> Targets -> SequenceTargets = one Parquet row -> student

Throughout, L is the number of tokens of a sequence, k the number of kept log-probabilities and n_T the number of
temperatures. Target t describes the distribution of ``input_ids[t + 1]``, so there are L-1 of them; the shift is
made here once, and nowhere else.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One tokenised sequence that the teacher has not seen yet.

    ``prompt_id`` is known before a teacher answers (a hash of the tokens before the first trained one);
    ``sequence_id`` is a hash of tokens and mask. ``source`` names file and row ("general.csv:17").
    """

    sequence_id: str
    prompt_id: str
    domain: str
    split: Split
    source: str
    metadata: dict[str, str] = field(default_factory=dict)
    prompt: str
    response: str
    input_ids: NDArray[np.int32]  # [L], L >= 2
    loss_mask: NDArray[np.bool_]  # [L-1], which targets train

    @property
    def num_targets(self) -> int:
        """L-1: the number of positions that have a target."""
        return len(self.input_ids) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A tokenised prompt that the teacher is to answer itself; with the answer it becomes a ``Prompt``.

    A prompt that is to have several answers gives several questions, told apart by ``number``, from 0.
    """

    prompt_id: str
    domain: str
    split: Split
    source: str
    metadata: dict[str, str] = field(default_factory=dict)
    prompt: str
    input_ids: NDArray[np.int32]  # [P], P >= 1, up to where the answer begins
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """An input row that did not become a sequence, and why."""

    domain: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the teacher leaves for the L-1 positions of one sequence.

    ``topk_logprobs`` are at T=1 over the real vocabulary, sorted downwards. ``log_z[:, j]`` and ``log_tail[:, j]``
    belong to the j-th temperature of the plan: ``log p_T(i) = topk_logprobs / T - log_z`` and
    ``exp(log_tail)`` is the teacher's mass outside the top-k. ``hidden[bits]`` holds the quantised coordinates of
    the fitted projection that use that many bits. ``entropy`` is in nats at T=1.

    Ids drawn from the teacher at T=1 come as unique ids with counts, position by position; the counts of a position
    sum to the number of draws, which tells where the next one begins. ``layers`` holds what is kept of inner layers
    by the names of their columns.
    """

    topk_ids: NDArray[np.int32]  # [L-1, k]
    topk_logprobs: NDArray[np.float32]  # [L-1, k]
    log_z: NDArray[np.float32]  # [L-1, n_T]
    log_tail: NDArray[np.float32]  # [L-1, n_T]
    hidden: dict[int, NDArray[np.int8]]  # bits -> [L-1, r_bits]
    entropy: NDArray[np.float32]  # [L-1]
    sampled_ids: NDArray[np.int32] | None = None  # [n], n between L-1 and (L-1) * draws
    sampled_counts: NDArray[np.int16] | None = None  # [n]
    layers: dict[str, NDArray[Any]] = field(default_factory=dict)  # layer<i>_… -> [L-1, width]

    def __post_init__(self) -> None:
        num = len(self.topk_ids)
        arrays: dict[str, NDArray[Any]] = {
            "topk_logprobs": self.topk_logprobs,
            "log_z": self.log_z,
            "log_tail": self.log_tail,
            "entropy": self.entropy,
            **{f"hidden_{bits}": values for bits, values in self.hidden.items()},
            **self.layers,
        }
        for name, values in arrays.items():
            assert len(values) == num, f"{name} has {len(values)} positions, topk_ids {num}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTargets:
    """A sequence and its targets: one row of a shard."""

    prompt: Prompt
    targets: Targets

    def __post_init__(self) -> None:
        assert len(self.targets.topk_ids) == self.prompt.num_targets, "one target per position but the last"
