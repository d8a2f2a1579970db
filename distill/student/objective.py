"""A batch flows in, its weighted losses flow out: what training minimises and what the best checkpoint is chosen by.

``N`` trained tokens.
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.cache.projection import Projection
from distill.cache.reader import CacheReader
from distill.config import StageConfig, WeightsConfig
from distill.errors import CorruptionError, UsageError
from distill.student.attention import AttentionLoss
from distill.student.batch import DistillBatch
from distill.student.contrast import contrastive_sum
from distill.student.losses.contrastive import TeacherVectors
from distill.student.losses.divergence import Divergence
from distill.student.losses.feature import FeatureAdapter, InnerStates
from distill.student.losses.fused import HeadTargets, fused_head_losses
from distill.student.losses.kl import TeacherTargets
from distill.student.losses.sampled import SampledTargets
from distill.student.losses.tail import TailModel
from distill.student.model import Student, causal_of
from distill.student.precision import Precision
from distill.student.shrink import same_depth


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherView:
    """What a trainer keeps of a cache beside its rows: projection and tail, where the cache has them.

    ``num_layers`` is the teacher's number of layers, where the cache keeps something of inner ones.
    """

    temperatures: tuple[float, ...]
    projection: Projection | None
    tail: TailModel | None
    num_layers: int | None = None

    @staticmethod
    def of(reader: CacheReader, precision: Precision) -> "TeacherView":
        """The view of an open cache, its tail on the device."""
        projection = reader.projection
        tail = num_layers = None
        if projection is not None:
            tail = TailModel.of(projection, device=precision.device, dtype=precision.compute_dtype)
            num_layers = _teacher_layers(reader) if projection.attention or projection.layers else None
        return TeacherView(temperatures=reader.temperatures, projection=projection, tail=tail, num_layers=num_layers)


def _teacher_layers(reader: CacheReader) -> int:
    """Raises CorruptionError where the teacher's configuration in the cache does not say it."""
    try:
        config = json.loads((reader.root / "teacher/config.json").read_bytes())
        return int({**config, **config.get("text_config", {})}["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(
            f"{reader.root}/teacher/config.json does not say how many layers the teacher has ({error}). Restore it "
            "from a copy."
        ) from error


def attention_loss_of(student: Student, view: TeacherView, stage: StageConfig) -> AttentionLoss | None:
    """The attention loss of a stage that has one, watching the student from now on. Raises as ``layer_pairs`` does."""
    if stage.weights.attention == 0 or view.projection is None or view.num_layers is None:
        return None
    causal = causal_of(student.model)
    return AttentionLoss(
        causal.base_model,
        causal.config.get_text_config(),
        view.projection.attention,
        stage.attention,
        depth=view.num_layers,
    )


def feature_adapter_of(student: Student, view: TeacherView, stage: StageConfig) -> FeatureAdapter | None:
    """A new adapter for a stage whose losses need one, the student's layers that it looks at being watched from now on.

    Raises UsageError when the stage pairs layers that are not there.
    """
    weights = stage.weights
    if view.projection is None or not (weights.feature > 0 or weights.contrastive > 0):
        return None
    pairs = _inner_pairs(stage, view.projection, view.num_layers, student) if weights.feature > 0 else {}
    student.watch(sorted(set(pairs.values())))
    return FeatureAdapter(student.hidden_size, view.projection, pairs).to(student.precision.device)


def _inner_pairs(
    stage: StageConfig, projection: Projection, teacher_layers: int | None, student: Student
) -> dict[int, int]:
    """The teacher's kept inner layers and the student's that learn from them."""
    asked, num = stage.feature.layers, student.num_layers
    if asked == "none" or teacher_layers is None:
        return {}
    if asked == "auto":
        kept = sorted(projection.layers)
        return {layer: same_depth(layer, teacher_layers=teacher_layers, student_layers=num) for layer in kept}
    for layer, own in asked.items():
        if layer not in projection.layers:
            raise UsageError(
                f"feature.layers names layer {layer} of the teacher, but the cache keeps states of "
                f"{', '.join(map(str, sorted(projection.layers))) or 'none'}. Name one of these, or make a cache with "
                "targets.layers."
            )
        if not 0 <= own < num:
            raise UsageError(
                f"feature.layers pairs layer {layer} of the teacher with layer {own} of the student, which has layers "
                f"0 to {num - 1}. Correct the number."
            )
    return dict(sorted(asked.items()))


def feature_sum(adapter: FeatureAdapter, student: Student, hidden_ND: Tensor, batch: DistillBatch) -> Tensor:
    """``Σ_n F_n`` of a batch, right after its ``hidden``. The batch has coordinates."""
    coords_NR, inner = batch.coords, None
    assert coords_NR is not None, "a cache without them has no feature adapter"
    if adapter.pairs and batch.inner is not None:
        states = student.take_inputs(batch)
        inner = InnerStates(student=states, teacher=batch.inner, at_start=batch.at_start)
    total: Tensor = adapter(hidden_ND, coords_NR, inner).sum()
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Sums over trained tokens. ``weighted`` carries the gradient; ``named`` has the terms of weight above 0."""

    weighted: Tensor
    named: dict[str, Tensor]


class Objective:
    """``Σ_n (w_kl T² D_n + w_ce CE_n + w_feature F_n + w_attention A_n + w_contrastive C_n)`` over trained tokens.

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
        attention: AttentionLoss | None = None,
    ) -> None:
        self.adapter, self._attention = adapter, attention
        self.weights = stage.weights  # those of the next batch; gradient balancing changes them
        self._student, self._view, self._stage, self._head_chunk = student, view, stage, head_chunk

    def __call__(self, batch: DistillBatch, candidates: TeacherVectors | None = None) -> LossSums:
        """The sums of a micro-batch. ``candidates`` are those of its optimizer step; without them nothing contrasts."""
        return self._sums(self._student.hidden(batch), batch, self.weights, candidates)

    def _sums(
        self, hidden_ND: Tensor, batch: DistillBatch, weights: WeightsConfig, candidates: TeacherVectors | None
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
        if weights.feature > 0 and self.adapter is not None and batch.levels is not None:
            with self._student.precision.context():
                feature = feature_sum(self.adapter, self._student, hidden_ND, batch)
            weighted = weighted + weights.feature * feature
            named["feature"] = feature.detach()
        if weights.attention > 0 and self._attention is not None:
            attention = self._attention(batch.heads)
            # Weights that are spread over ranks are gathered for a layer's backward pass when a gradient reaches what
            # the layer puts out, and that of queries and keys does not: an empty sum sends one of 0 through them all.
            weighted = weighted + weights.attention * attention + hidden_ND[:0].sum()
            named["attention"] = attention.detach()
        if weights.contrastive > 0 and self.adapter is not None and candidates is not None:
            with self._student.precision.context():
                contrastive = contrastive_sum(self.adapter, hidden_ND, batch, candidates, stage=self._stage)
            weighted = weighted + weights.contrastive * contrastive
            named["contrastive"] = contrastive.detach()
        return LossSums(weighted=weighted, named=named)

    def _head_targets(self, batch: DistillBatch) -> HeadTargets:
        stage, view = self._stage, self._view
        low_rank = stage.tail == "low_rank"
        teacher: TeacherTargets | SampledTargets
        if stage.tail == "sampled":
            assert batch.sampled is not None, "the stage's plan refuses a cache without draws"
            teacher = batch.sampled
        else:
            teacher = batch.teacher(stage.temperature, view.temperatures.index(stage.temperature))
        return HeadTargets(
            teacher=teacher,
            labels=batch.labels,
            coords=batch.coords if low_rank else None,
            tail=view.tail if low_rank else None,
            divergence=Divergence.of(stage),
        )
