"""Held-out figures: what an evaluation finds flows out as records that checkpoints, logs and reports share."""

import math
from dataclasses import dataclass, field

from distill.config import StageConfig, TailShape


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Tokens at which the student's first choice had a probability of one range: their means."""

    num_tokens: int
    confidence: float  # the probability that it gave
    accuracy: float  # the share where that choice came


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Means over trained tokens. ``kl`` has KL(teacher || student) in nats at each temperature, without T²."""

    num_sequences: int
    num_tokens: int
    kl: dict[float, float]
    ce: float
    perplexity: float
    top1_agreement: float  # share of tokens where the student's first choice is the teacher's
    top5_agreement: float  # mean share of the teacher's first five among the student's first five
    ece: float  # expected calibration error of the student against the next token, 15 bins (Guo et al. 2017)
    feature: float | None  # see losses.feature; None without an adapter
    contrastive: float | None = None  # see contrast.py; among the rows read together; None without its weight
    attention: float | None = None  # see losses.attention; None without its weight
    divergence: float | None = None  # the stage's own at its temperature, without T²; None where that is ``kl``
    calibration: tuple[CalibrationBin, ...] = ()  # what ``ece`` sums up: bins with tokens, by rising confidence

    @property
    def is_finite(self) -> bool:
        """Whether no logit overflowed."""
        found = (self.ce, *self.kl.values(), self.feature, self.contrastive, self.attention, self.divergence)
        return all(value is None or math.isfinite(value) for value in found)

    def objective(self, stage: StageConfig) -> float:
        """The stage's weighted loss, as ``objective.Objective`` has it but for each token.

        Its KL is measured with the best tail that the cache has, whatever ``stage.tail`` trains on.
        """
        weights = stage.weights
        divergence = self.kl[stage.temperature] if self.divergence is None else self.divergence
        kl = weights.kl * stage.temperature**2 * divergence
        hidden = weights.feature * (self.feature or 0.0) + weights.contrastive * (self.contrastive or 0.0)
        return kl + weights.ce * self.ce + hidden + weights.attention * (self.attention or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures of each domain, of all tokens together, and of each group where rows were grouped by a metadata key.

    ``tail`` says what the teacher's tail was rebuilt from.
    """

    tail: TailShape
    domains: dict[str, Figures]
    overall: Figures
    groups: dict[str, Figures] = field(default_factory=dict)

    def objective(self, stage: StageConfig) -> float:
        """The stage's weighted loss on these rows, as ``Figures.objective`` has it."""
        return self.overall.objective(stage)
