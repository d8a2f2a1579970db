"""A batch flows in, its weighted losses flow out: what training minimises and what the best checkpoint is chosen by.

``N`` trained tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.cache.projection import Projection
from distill.cache.reader import CacheReader
from distill.config import StageConfig, WeightsConfig
from distill.student.batch import DistillBatch
from distill.student.contrast import contrastive_sum
from distill.student.losses.contrastive import Candidates
from distill.student.losses.divergence import Divergence
from distill.student.losses.feature import FeatureAdapter
from distill.student.losses.fused import HeadTargets, fused_head_losses
from distill.student.losses.tail import TailModel
from distill.student.model import Student
from distill.student.precision import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherView:
    """What a trainer keeps of a cache beside its rows: projection and tail, where the cache has them."""

    temperatures: tuple[float, ...]
    projection: Projection | None
    tail: TailModel | None

    @staticmethod
    def of(reader: CacheReader, precision: Precision) -> "TeacherView":
        """The view of an open cache, its tail on the device."""
        projection = reader.projection
        tail = None
        if projection is not None:
            tail = TailModel.of(projection, device=precision.device, dtype=precision.compute_dtype)
        return TeacherView(temperatures=reader.temperatures, projection=projection, tail=tail)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Sums over trained tokens. ``weighted`` carries the gradient; ``named`` has the terms of weight above 0."""

    weighted: Tensor
    named: dict[str, Tensor]


class Objective:
    """``Σ_n (w_kl T² D_n + w_ce CE_n + w_feature F_n + w_contrastive C_n)`` over a batch's trained tokens.

    D is the stage's divergence, C_n the contrastive loss of the sequence of token n.
    """

    def __init__(
        self,
        student: Student,
        view: TeacherView,
        stage: StageConfig,
        *,
        adapter: FeatureAdapter | None,
        head_chunk: int,
    ) -> None:
        self.adapter = adapter
        self.weights = stage.weights  # those of the next batch; gradient balancing changes them
        self._student, self._view, self._stage, self._head_chunk = student, view, stage, head_chunk

    def __call__(self, batch: DistillBatch, candidates: Candidates | None = None) -> LossSums:
        """The sums of a micro-batch. ``candidates`` are those of its optimizer step; without them nothing contrasts."""
        return self._sums(self._student.hidden(batch), batch, self.weights, candidates)

    def gradients(
        self,
        batch: DistillBatch,
        candidates: Candidates | None,
        parameters: Sequence[nn.Parameter],
        *,
        scale: float,
    ) -> dict[str, list[Tensor]]:
        """``scale`` times the gradient of each loss alone, summed over tokens, with respect to ``parameters``."""
        hidden_ND = self._student.hidden(batch)
        wanted = [name for name, weight in self._stage.weights.model_dump().items() if weight > 0]
        gradients = {}
        for name in wanted:
            alone = WeightsConfig.model_validate({**dict.fromkeys(WeightsConfig.model_fields, 0.0), name: 1.0})
            value = self._sums(hidden_ND, batch, alone, candidates).weighted * scale
            found = torch.autograd.grad(value, parameters, retain_graph=name != wanted[-1], allow_unused=True)
            gradients[name] = [
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(parameters, found, strict=True)
            ]
        return gradients

    def _sums(
        self, hidden_ND: Tensor, batch: DistillBatch, weights: WeightsConfig, candidates: Candidates | None
    ) -> LossSums:
        weighted = torch.zeros((), device=hidden_ND.device)
        named: dict[str, Tensor] = {}
        if weights.kl > 0 or weights.ce > 0:
            losses = fused_head_losses(
                hidden_ND,
                self._student.head(),
                self._head_targets(batch),
                kl_weight=weights.kl,
                ce_weight=weights.ce,
                chunk=self._head_chunk,
            )
            weighted = weighted + losses.weighted
            terms = (("kl", losses.kl, weights.kl), ("ce", losses.ce, weights.ce))
            named |= {name: value for name, value, weight in terms if weight > 0}
        if weights.feature > 0 and self.adapter is not None and batch.coords is not None:
            with self._student.precision.context():
                feature = self.adapter(hidden_ND, batch.coords).sum()
            weighted = weighted + weights.feature * feature
            named["feature"] = feature.detach()
        if weights.contrastive > 0 and self.adapter is not None and candidates is not None:
            temperature = self._stage.contrastive_temperature
            with self._student.precision.context():
                contrastive = contrastive_sum(self.adapter, hidden_ND, batch, candidates, temperature=temperature)
            weighted = weighted + weights.contrastive * contrastive
            named["contrastive"] = contrastive.detach()
        return LossSums(weighted=weighted, named=named)

    def _head_targets(self, batch: DistillBatch) -> HeadTargets:
        stage, view = self._stage, self._view
        low_rank = stage.tail == "low_rank"
        return HeadTargets(
            teacher=batch.teacher(stage.temperature, view.temperatures.index(stage.temperature)),
            labels=batch.labels,
            coords=batch.coords if low_rank else None,
            tail=view.tail if low_rank else None,
            divergence=Divergence.of(stage),
        )
