"""A few held-out rows flow in, the student's distribution at each of their tokens beside the teacher's flows out.

    held-out rows -> Spotlight -> stage<N>/tokens.json -> distill report

The record is small and holds texts alone, so that a report needs neither the cache nor torch. ``N`` tokens shown, ``D``
the student's hidden size, ``V`` real vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from distill.cache import storage
from distill.cache.reader import CacheReader
from distill.cache.views import (
    NUM_CHOICES,
    Expected,
    Record,
    SequenceView,
    expected_of,
    held_out_rows,
    view_of,
    window_of,
    with_student,
)
from distill.config import TrainConfig
from distill.records import SequenceTargets
from distill.student.batch import Example, collate, example_of
from distill.student.losses.fused import chunks_of_logits
from distill.student.model import Student

TOKENS_FILE = "tokens.json"


class Spotlight:
    """Looks at the same held-out sequences each time: ``config.samples`` of each domain, ``sample_tokens`` long."""

    def __init__(
        self, config: TrainConfig, student: Student, tokenizer: Any, *, reader: CacheReader, domains: Sequence[str]
    ) -> None:
        self._student, self._chunk = student, config.head_chunk
        self._decode = partial(tokenizer.decode, skip_special_tokens=False)
        self._shown: list[tuple[SequenceView, Example]] = []
        for row in (row for domain in domains for row in islice(held_out_rows(reader, domain), config.samples)):
            window = window_of(row, num_tokens=config.sample_tokens, max_length=config.max_length)
            example = _example(row, window.positions, window.stop)
            self._shown.append((view_of(row, window, self._decode), example))

    @torch.no_grad()
    def __call__(self) -> list[SequenceView]:
        """The views now. Where the student's weights are spread over processes, each of these must look."""
        model = self._student.model
        was_training = model.training
        model.eval()
        views = [with_student(view, self._expected(example)) for view, example in self._shown]
        model.train(was_training)
        return views

    def _expected(self, example: Example) -> list[Expected]:
        batch = collate([example], None).to(self._student.precision.device)
        hidden_ND = self._student.hidden(batch)
        head = self._student.head()
        expected = []
        for _, _, raw_NV in chunks_of_logits(hidden_ND, head, head.matrix(), chunk=self._chunk):
            probabilities, ids = (part.cpu() for part in head.finish(raw_NV).softmax(1).topk(self._num(raw_NV), dim=1))
            rows = zip(ids.tolist(), probabilities.tolist(), strict=True)
            expected += [expected_of(row_ids, values, self._decode) for row_ids, values in rows]
        return expected

    @staticmethod
    def _num(logits_NV: torch.Tensor) -> int:
        return min(NUM_CHOICES, logits_NV.shape[1])


def write_views(folder: Path, views: Sequence[SequenceView], *, step: int) -> None:
    """``tokens.json`` in a stage's folder, in place of an earlier one. Raises StorageError when the disk refuses."""
    data = TypeAdapter(Record).dump_json(Record(step=step, sequences=tuple(views)))
    storage.write(folder / TOKENS_FILE, lambda file: file.write(data), need=len(data))


def _example(row: SequenceTargets, positions: np.ndarray[Any, np.dtype[np.int64]], stop: int) -> Example:
    """The row up to the window's end, as if the targets of exactly its tokens trained."""
    mask = np.zeros_like(row.prompt.loss_mask)
    mask[positions] = True
    return example_of(replace(row, prompt=replace(row.prompt, loss_mask=mask)), stop)
