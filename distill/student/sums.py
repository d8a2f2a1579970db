"""Logits of held-out tokens flow in, running sums flow through, ``Figures`` flow out.

``N`` trained tokens, ``V`` real vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.student.figures import CalibrationBin, Figures

_TOP = 5
_BINS = 15


@dataclass(slots=True)
class Sums:
    """Sums over trained tokens; ``kl`` by temperature, without T²."""

    temperatures: tuple[float, ...]
    num_sequences: int = 0
    num_tokens: int = 0
    ce: float = 0.0
    agreed: int = 0
    overlap: float = 0.0
    feature: float | None = None
    contrastive: float | None = None
    attention: float | None = None
    divergence: float | None = None
    kl: dict[float, float] = field(default_factory=dict)
    confidence: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.float64))
    hits: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.float64))
    binned: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))  # tokens

    def __post_init__(self) -> None:
        self.kl = dict.fromkeys(self.temperatures, 0.0)

    def add(self, other: "Sums") -> None:
        """Take in the sums of other tokens."""
        self.num_sequences += other.num_sequences
        self.num_tokens += other.num_tokens
        self.ce += other.ce
        self.agreed += other.agreed
        self.overlap += other.overlap
        self.confidence += other.confidence
        self.hits += other.hits
        self.binned += other.binned
        self.feature = _plus(self.feature, other.feature)
        self.contrastive = _plus(self.contrastive, other.contrastive)
        self.attention = _plus(self.attention, other.attention)
        self.divergence = _plus(self.divergence, other.divergence)
        for temperature, value in other.kl.items():
            self.kl[temperature] += value

    def add_choices(self, logits_NV: Tensor, labels_N: Tensor, topk_ids_NK: Tensor) -> None:
        """The student's choices at T=1 against the next token (calibration) and against the teacher's (agreement)."""
        self.num_tokens += len(labels_N)
        num_top = min(_TOP, topk_ids_NK.shape[1])
        ours_NK, theirs_NK = logits_NV.topk(num_top, dim=1).indices, topk_ids_NK[:, :num_top]
        chosen_N = logits_NV.argmax(1)
        self.agreed += int((chosen_N == theirs_NK[:, 0]).sum())
        self.overlap += int((ours_NK.unsqueeze(2) == theirs_NK.unsqueeze(1)).sum()) / num_top
        confidence_N = (logits_NV.amax(1) - logits_NV.logsumexp(1)).exp().double().cpu()
        bins_N = (confidence_N * _BINS).long().clamp(0, _BINS - 1)
        self.confidence.index_add_(0, bins_N, confidence_N)
        self.hits.index_add_(0, bins_N, (chosen_N == labels_N).double().cpu())
        self.binned += bins_N.bincount(minlength=_BINS)

    def figures(self) -> Figures:
        """Means over the tokens, of which there must be one at least."""
        num, ce = self.num_tokens, self.ce / self.num_tokens
        return Figures(
            num_sequences=self.num_sequences,
            num_tokens=num,
            kl={temperature: value / num for temperature, value in self.kl.items()},
            ce=ce,
            perplexity=math.exp(min(ce, 700.0)),
            top1_agreement=self.agreed / num,
            top5_agreement=self.overlap / num,
            ece=float((self.confidence - self.hits).abs().sum()) / num,
            feature=None if self.feature is None else self.feature / num,
            contrastive=None if self.contrastive is None else self.contrastive / num,
            attention=None if self.attention is None else self.attention / num,
            divergence=None if self.divergence is None else self.divergence / num,
            calibration=self._calibration(),
        )

    def _calibration(self) -> tuple[CalibrationBin, ...]:
        bins = zip(self.binned.tolist(), self.confidence.tolist(), self.hits.tolist(), strict=True)
        return tuple(
            CalibrationBin(num_tokens=num, confidence=confidence / num, accuracy=hits / num)
            for num, confidence, hits in bins
            if num
        )


def _plus(one: float | None, other: float | None) -> float | None:
    return one if other is None else (one or 0.0) + other
