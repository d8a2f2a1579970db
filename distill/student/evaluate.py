"""A student and held-out rows flow in, its distance to the teacher flows out, by domain.

``N`` trained tokens, ``V`` real vocabulary. Logits exist only for a chunk of tokens at a time, as in training.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distill.cache.reader import CacheReader
from distill.config import TrainConfig
from distill.errors import DataError
from distill.student.batch import DistillBatch, Example, collate, example_of, micro_batches
from distill.student.figures import Evaluation, Figures
from distill.student.losses.ce import cross_entropy
from distill.student.losses.feature import FeatureAdapter
from distill.student.losses.fused import chunks_of_logits
from distill.student.losses.kl import forward_kl
from distill.student.model import Student, load_student
from distill.student.objective import TeacherView
from distill.student.order import permutation
from distill.student.origin import origin_of
from distill.student.precision import resolve_precision
from distill.student.tokenizer import matching_tokenizer

_READ_AT_ONCE = 256  # examples that are sorted by length together


class Evaluator:
    """Measures a student against a cache's targets at some of its temperatures."""

    def __init__(
        self, student: Student, view: TeacherView, config: TrainConfig, *, temperatures: tuple[float, ...]
    ) -> None:
        self._student, self._view, self._config = student, view, config
        self._temperatures = temperatures

    def __call__(
        self, held_out: Mapping[str, Iterable[Example]], adapter: FeatureAdapter | None = None
    ) -> Evaluation | None:
        """Figures of the rows of each domain; None when no row has a trained token."""
        was_training = self._student.model.training
        self._student.model.eval()
        with torch.no_grad():
            sums = {domain: self._sums(examples, adapter) for domain, examples in held_out.items()}
        self._student.model.train(was_training)
        sums = {domain: part for domain, part in sums.items() if part.num_tokens}
        if not sums:
            return None
        overall = _Sums(self._temperatures)
        for part in sums.values():
            overall.add(part)
        return Evaluation(
            tail="bucket" if self._view.tail is None else "low_rank",
            domains={domain: part.figures() for domain, part in sums.items()},
            overall=overall.figures(),
        )

    def _sums(self, examples: Iterable[Example], adapter: FeatureAdapter | None) -> "_Sums":
        sums = _Sums(self._temperatures)
        walk = iter(examples)
        while read := list(itertools.islice(walk, _READ_AT_ONCE)):
            sums.num_sequences += len(read)
            for group in micro_batches(read, self._config.micro_batch_tokens):
                batch = collate(group, self._view.projection).to(self._student.precision.device)
                hidden_ND = self._student.hidden(batch)
                self._add_head(sums, hidden_ND, batch)
                if adapter is not None and batch.coords is not None:
                    with self._student.precision.context():
                        sums.feature = (sums.feature or 0.0) + float(adapter(hidden_ND, batch.coords).sum())
        return sums

    def _add_head(self, sums: "_Sums", hidden_ND: Tensor, batch: DistillBatch) -> None:
        head, tail = self._student.head(), self._view.tail
        low_rank = tail is not None and batch.coords is not None
        targets = {T: self._view.head_targets(batch, T, low_rank=low_rank).teacher for T in self._temperatures}
        for start, stop, raw_NV in chunks_of_logits(hidden_ND, head, head.matrix(), chunk=self._config.head_chunk):
            logits_NV = head.finish(raw_NV)
            sums.num_tokens += stop - start
            sums.ce += float(cross_entropy(logits_NV, batch.labels[start:stop]).sum())
            sums.agreed += int((logits_NV.argmax(1) == batch.topk_ids[start:stop, 0]).sum())
            tail_NV = None if tail is None or batch.coords is None else tail.logits(batch.coords[start:stop])
            for temperature, teacher in targets.items():
                kl_N = forward_kl(logits_NV, teacher.rows(start, stop), tail_NV) / temperature**2
                sums.kl[temperature] += float(kl_N.sum())


@dataclass(slots=True)
class _Sums:
    temperatures: tuple[float, ...]
    num_sequences: int = 0
    num_tokens: int = 0
    ce: float = 0.0
    agreed: int = 0
    feature: float | None = None
    kl: dict[float, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kl = dict.fromkeys(self.temperatures, 0.0)

    def add(self, other: "_Sums") -> None:
        self.num_sequences += other.num_sequences
        self.num_tokens += other.num_tokens
        self.ce += other.ce
        self.agreed += other.agreed
        if other.feature is not None:
            self.feature = (self.feature or 0.0) + other.feature
        for temperature, value in other.kl.items():
            self.kl[temperature] += value

    def figures(self) -> Figures:
        ce = self.ce / self.num_tokens
        return Figures(
            num_sequences=self.num_sequences,
            num_tokens=self.num_tokens,
            kl={temperature: value / self.num_tokens for temperature, value in self.kl.items()},
            ce=ce,
            perplexity=math.exp(min(ce, 700.0)),
            top1_agreement=self.agreed / self.num_tokens,
            feature=None if self.feature is None else self.feature / self.num_tokens,
        )


def held_out_examples(
    reader: CacheReader, domain: str, *, max_length: int, rows: int | None = None
) -> Iterator[Example]:
    """The held-out rows of a domain, or ``rows`` of them from units drawn by a fixed hash."""
    commits = [commit for commit in reader.units(domain) if commit.num_rows.eval]
    sequences = (
        sequence
        for index in permutation(len(commits), "held-out", domain)
        for sequence in reader.sequences(commits[index], "eval")
    )
    return (example_of(sequence, max_length) for sequence in itertools.islice(sequences, rows))


def evaluate_model(config: TrainConfig, model: str | Path | None = None) -> Evaluation:
    """Measure a model against all held-out rows of ``config.cache``, at every temperature of the cache.

    ``model`` is a checkpoint of a run (``RUN/stage1/best``), a model or adapter folder, or a hub name; the untrained
    ``config.student`` when None. Raises IdentityError when its tokenizer is not the teacher's, DataError when the cache
    holds no held-out rows, and what the loading of models and caches raises.
    """
    reader = CacheReader.open(config.cache, allow_incomplete=config.allow_incomplete)
    origin = origin_of(config.student if model is None else model)
    matching_tokenizer(origin.base, reader, trust_remote_code=config.trust_remote_code)
    precision = resolve_precision(config.device, config.precision)
    student = load_student(config, origin, precision=precision, vocab_size=reader.identity.vocab_size, training=False)
    evaluator = Evaluator(student, TeacherView.of(reader, precision), config, temperatures=reader.temperatures)
    evaluation = evaluator(
        {domain: held_out_examples(reader, domain, max_length=config.max_length) for domain in reader.domains}
    )
    if evaluation is None:
        raise DataError(
            f"{reader.root} has no held-out sequence with a trained token, so there is nothing to measure on. Make the "
            "cache with --eval DOMAIN=PATH or an eval_fraction above 0."
        )
    return evaluation
