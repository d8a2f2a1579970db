"""Held-out figures: what an evaluation finds flows out as records that checkpoints, logs and reports share."""

from dataclasses import dataclass

from distill.config import StageConfig, Tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Means over trained tokens. ``kl`` has KL(teacher || student) in nats at each temperature, without T²."""

    num_sequences: int
    num_tokens: int
    kl: dict[float, float]
    ce: float
    perplexity: float
    top1_agreement: float  # share of tokens where the student's first choice is the teacher's
    feature: float | None  # see losses.feature; None without an adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures of each domain and of all tokens together. ``tail`` says what the teacher's tail was rebuilt from."""

    tail: Tail
    domains: dict[str, Figures]
    overall: Figures

    def objective(self, stage: StageConfig) -> float:
        """The stage's weighted loss on these rows: ``w_kl T² KL + w_ce CE + w_feature feature``."""
        weights, figures = stage.weights, self.overall
        kl = weights.kl * stage.temperature**2 * figures.kl[stage.temperature]
        return kl + weights.ce * figures.ce + weights.feature * (figures.feature or 0.0)
