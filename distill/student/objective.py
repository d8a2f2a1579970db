"""A batch flows in, its weighted losses flow out: what training minimises and what the best checkpoint is chosen by.

``N`` trained tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.cache.projection import Projection
from distill.cache.reader import CacheReader
from distill.config import StageConfig
from distill.student.batch import DistillBatch
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

    def head_targets(self, batch: DistillBatch, temperature: float, *, low_rank: bool) -> HeadTargets:
        """The batch's targets at one of the cache's temperatures."""
        return HeadTargets(
            teacher=batch.teacher(temperature, self.temperatures.index(temperature)),
            labels=batch.labels,
            coords=batch.coords if low_rank else None,
            tail=self.tail if low_rank else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Sums over trained tokens. ``weighted`` carries the gradient; ``named`` has the terms of weight above 0."""

    weighted: Tensor
    named: dict[str, Tensor]


class Objective:
    """``Σ_n (w_kl T² KL_n + w_ce CE_n + w_feature feature_n)`` over a batch's trained tokens."""

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
        self._student, self._view, self._stage, self._head_chunk = student, view, stage, head_chunk

    def __call__(self, batch: DistillBatch) -> LossSums:
        weights = self._stage.weights
        hidden_ND = self._student.hidden(batch)
        weighted = torch.zeros((), device=hidden_ND.device)
        named: dict[str, Tensor] = {}
        if weights.kl > 0 or weights.ce > 0:
            losses = fused_head_losses(
                hidden_ND,
                self._student.head(),
                self._view.head_targets(batch, self._stage.temperature, low_rank=self._stage.tail == "low_rank"),
                kl_weight=weights.kl,
                ce_weight=weights.ce,
                chunk=self._head_chunk,
            )
            weighted = weighted + losses.weighted
            terms = (("kl", losses.kl, weights.kl), ("ce", losses.ce, weights.ce))
            named |= {name: value for name, value, weight in terms if weight > 0}
        if self.adapter is not None and batch.coords is not None:
            with self._student.precision.context():
                feature = self.adapter(hidden_ND, batch.coords).sum()
            weighted = weighted + weights.feature * feature
            named["feature"] = feature.detach()
        return LossSums(weighted=weighted, named=named)
