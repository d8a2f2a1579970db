"""A student and held-out rows flow in, its distance to the teacher flows out, by domain and group.

``N`` trained tokens, ``V`` real vocabulary. Logits exist only for a chunk of tokens at a time, as in training.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.cache.join import open_caches
from distill.cache.reader import CacheReader
from distill.config import StageConfig, TrainConfig
from distill.errors import DataError, UsageError
from distill.student.attention import AttentionLoss
from distill.student.batch import NO_GROUP, DistillBatch, Example, collate, example_of, rank_batches
from distill.student.contrast import candidates_of, contrastive_sum
from distill.student.figures import Evaluation
from distill.student.losses.ce import cross_entropy
from distill.student.losses.contrastive import TeacherVectors
from distill.student.losses.divergence import Divergence
from distill.student.losses.feature import FeatureAdapter
from distill.student.losses.fused import chunks_of_logits
from distill.student.losses.kl import forward_kl
from distill.student.mixture import has_share
from distill.student.model import Student, load_student
from distill.student.objective import TeacherView, feature_sum
from distill.student.order import permutation
from distill.student.origin import origin_of
from distill.student.precision import resolve_precision
from distill.student.ranks import ALONE, Ranks
from distill.student.sums import Sums
from distill.student.tokenizer import load_tokenizer, matching_tokenizer

_READ_AT_ONCE = 256  # examples that are sorted by length together


class Evaluator:
    """Measures a student against a cache's targets at some of its temperatures, and by a stage's own divergence."""

    def __init__(
        self,
        student: Student,
        view: TeacherView,
        config: TrainConfig,
        *,
        temperatures: tuple[float, ...],
        stage: StageConfig | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._student, self._view, self._config = student, view, config
        self._temperatures = temperatures
        self._stage = stage
        self._ranks = ranks  # which share the rows between them, and come to the same figures
        self._divergence = None if stage is None or stage.divergence == "forward" else Divergence.of(stage)

    def __call__(
        self,
        held_out: Mapping[str, Iterable[Example]],
        adapter: FeatureAdapter | None = None,
        attention: AttentionLoss | None = None,
    ) -> Evaluation | None:
        """Figures of the rows of each domain, and of each group that they name; None when no token is trained.

        ``adapter`` and ``attention`` are the learner's. Domains that the stage does not train on have figures of their
        own, and are in no other's.
        """
        was_training = self._student.model.training
        self._student.model.eval()
        with torch.no_grad():
            cells = {
                domain: self._added(self._sums(examples, adapter, attention)) for domain, examples in held_out.items()
            }
        self._student.model.train(was_training)
        domains: dict[str, Sums] = {}
        groups: dict[str, Sums] = {}
        overall = Sums(self._temperatures)
        for domain, by_group in cells.items():
            for group, part in by_group.items():
                domains.setdefault(domain, Sums(self._temperatures)).add(part)
                if not self._trains_on(domain):
                    continue
                overall.add(part)
                if group is not None:
                    groups.setdefault(group, Sums(self._temperatures)).add(part)
        if not overall.num_tokens:
            return None
        return Evaluation(
            tail="bucket" if self._view.tail is None else "low_rank",
            domains={domain: part.figures() for domain, part in domains.items() if part.num_tokens},
            overall=overall.figures(),
            groups={group: groups[group].figures() for group in sorted(groups) if groups[group].num_tokens},
        )

    def _trains_on(self, domain: str) -> bool:
        return self._stage is None or (domain in self._stage.shares and has_share(self._stage.shares[domain]))

    def _sums(
        self, examples: Iterable[Example], adapter: FeatureAdapter | None, attention: AttentionLoss | None
    ) -> dict[str | None, Sums]:
        """The sums of each group of these rows."""
        by_group: dict[str | None, Sums] = {}
        walk = iter(examples)
        while read := list(itertools.islice(walk, _READ_AT_ONCE)):
            candidates = self._candidates(read) if adapter is not None else None
            for group in dict.fromkeys(example.group for example in read):
                members = [example for example in read if example.group == group]
                sums = by_group.setdefault(group, Sums(self._temperatures))
                sums.num_sequences += len(members) if self._ranks.is_first else 0
                batches = rank_batches(
                    members, self._config.micro_batch_tokens, self._ranks, in_step=self._student.is_sharded
                )
                for examples_at_once, counts in batches:
                    part = self._of_batch(examples_at_once, adapter, attention, candidates)
                    if counts:
                        sums.add(part)
        return by_group

    def _added(self, by_group: dict[str | None, Sums]) -> dict[str | None, Sums]:
        """The sums of all ranks together."""
        first, *others = self._ranks.gather(by_group)
        for other in others:
            for group, sums in other.items():
                first[group].add(sums)
        return first

    def _candidates(self, examples: list[Example]) -> TeacherVectors | None:
        stage, projection = self._stage, self._view.projection
        if stage is None or stage.weights.contrastive == 0 or projection is None:
            return None
        if not any(example.num_trained for example in examples):
            return None
        return candidates_of(examples, projection, self._student.precision.device)

    def _of_batch(
        self,
        examples: list[Example],
        adapter: FeatureAdapter | None,
        attention: AttentionLoss | None,
        candidates: TeacherVectors | None,
    ) -> Sums:
        batch = collate(examples, self._view.projection).to(self._student.precision.device)
        sums = Sums(self._temperatures)
        hidden_ND = self._student.hidden(batch)
        self._add_head(sums, hidden_ND, batch)
        if attention is not None:
            sums.attention = float(attention(batch.heads))
        if adapter is not None and batch.levels is not None:
            with self._student.precision.context():
                sums.feature = float(feature_sum(adapter, self._student, hidden_ND, batch))
                if candidates is not None and self._stage is not None:
                    sums.contrastive = float(contrastive_sum(adapter, hidden_ND, batch, candidates, stage=self._stage))
        return sums

    def _add_head(self, sums: Sums, hidden_ND: Tensor, batch: DistillBatch) -> None:
        head, tail, coords_NR = self._student.head(), self._view.tail, batch.coords
        teachers = {T: batch.teacher(T, self._view.temperatures.index(T)) for T in self._temperatures}
        for start, stop, raw_NV in chunks_of_logits(hidden_ND, head, head.matrix(), chunk=self._config.head_chunk):
            logits_NV = head.finish(raw_NV)
            sums.add_choices(logits_NV, batch.labels[start:stop], batch.topk_ids[start:stop])
            sums.ce += float(cross_entropy(logits_NV, batch.labels[start:stop]).sum())
            tail_NV = None if tail is None or coords_NR is None else tail.logits(coords_NR[start:stop])
            for temperature, teacher in teachers.items():
                kl_N = forward_kl(logits_NV, teacher.rows(start, stop), tail_NV) / temperature**2
                sums.kl[temperature] += float(kl_N.sum())
            if self._stage is not None and self._divergence is not None:
                stage_teacher = teachers[self._stage.temperature].rows(start, stop)
                values_N = self._divergence(logits_NV, stage_teacher, tail_NV)
                sums.divergence = (sums.divergence or 0.0) + float(values_N.sum()) / self._stage.temperature**2


def held_out_examples(
    reader: CacheReader, domain: str, *, max_length: int, rows: int | None = None, group_by: str | None = None
) -> Iterator[Example]:
    """The held-out rows of a domain, or ``rows`` of them from units drawn by a fixed hash; see ``batch.group_of``."""
    commits = [commit for commit in reader.units(domain) if commit.num_rows.eval]
    sequences = (
        sequence
        for index in permutation(len(commits), "held-out", domain)
        for sequence in reader.sequences(commits[index], "eval")
    )
    return (example_of(sequence, max_length, group_by=group_by) for sequence in itertools.islice(sequences, rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to be measured, and its tokenizer."""

    student: Student
    tokenizer: Any

    @staticmethod
    def load(config: TrainConfig, model: str | Path | None = None, *, reader: CacheReader | None) -> "Subject":
        """``model``, or the untrained ``config.student`` when None, in evaluation mode.

        ``model`` is a checkpoint of a run (``RUN/stage1/best``), a model or adapter folder, or a hub name. With a
        ``reader`` its tokenizer must be the teacher's, else IdentityError. Raises what the loading of models raises.
        """
        origin = origin_of(config.student if model is None else model)
        precision = resolve_precision(config.device, config.precision)
        trust = config.trust_remote_code
        if reader is None:
            tokenizer = load_tokenizer(origin.base, trust_remote_code=trust)
            vocab_size = len(tokenizer)
        else:
            tokenizer = matching_tokenizer(origin.base, reader, trust_remote_code=trust)
            vocab_size = reader.identity.vocab_size
        student = load_student(config, origin, precision=precision, vocab_size=vocab_size, training=False)
        return Subject(student=student, tokenizer=tokenizer)


def evaluate_model(config: TrainConfig, model: str | Path | None = None, *, group_by: str | None = None) -> Evaluation:
    """Measure a model against all held-out rows of ``config.cache``; see ``Subject.load`` and ``held_out_figures``."""
    reader = open_caches(config.caches, allow_incomplete=config.allow_incomplete)
    subject = Subject.load(config, model, reader=reader)
    return held_out_figures(subject.student, reader, config, group_by=group_by)


def held_out_figures(
    student: Student, reader: CacheReader, config: TrainConfig, *, group_by: str | None = None
) -> Evaluation:
    """Figures of all held-out rows, at every temperature of the cache.

    ``group_by`` names a metadata key of the rows, by whose values figures are given as well. Raises DataError when the
    cache holds no held-out rows, UsageError when none has the key.
    """
    view = TeacherView.of(reader, student.precision)
    evaluator = Evaluator(student, view, config, temperatures=reader.temperatures)
    evaluation = evaluator(
        {
            domain: held_out_examples(reader, domain, max_length=config.max_length, group_by=group_by)
            for domain in reader.domains
        }
    )
    if evaluation is None:
        raise DataError(
            f"{reader.where} has no held-out sequence with a trained token within max_length {config.max_length}, so "
            "there is nothing to measure on. Raise max_length, or make the cache with --eval DOMAIN=PATH or an "
            "eval_fraction above 0."
        )
    if group_by is not None and set(evaluation.groups) == {NO_GROUP}:
        raise UsageError(
            f"no held-out row of {reader.where} has the metadata key '{group_by}', so there are no groups to tell "
            f"apart. `distill inspect {reader.root}` shows a row with its metadata."
        )
    return evaluation
