"""A cache flows in, and every number in it is held against a forward pass of the same weights in transformers."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.cache.reader import CacheReader
from distill.records import SequenceTargets

TEMPERATURES = (4.0, 2.0, 1.0)
K = 64


def sequences(cache: CacheReader) -> dict[str, SequenceTargets]:
    """Every row of a cache by its sequence_id."""
    rows = (row for commit in cache.commits for split in ("train", "eval") for row in cache.sequences(commit, split))
    return {row.prompt.sequence_id: row for row in rows}


def forward(teacher: Path, rows: Sequence[SequenceTargets]) -> Iterator[tuple[SequenceTargets, np.ndarray, np.ndarray]]:
    """(row, log-probabilities [L-1, V] float64 of the next token, final hidden states [L-1, D]) by transformers."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    vocab_size = len(AutoTokenizer.from_pretrained(teacher))
    for row in rows:
        ids = torch.tensor(row.prompt.input_ids, dtype=torch.long)[None]
        with torch.inference_mode():
            output = model(ids, output_hidden_states=True)
        logits_NV = output.logits[0, :-1, :vocab_size].double()
        yield row, logits_NV.log_softmax(1).numpy(), output.hidden_states[-1][0, :-1].numpy()


def assert_numbers(cache: CacheReader, teacher: Path, rows: Sequence[SequenceTargets]) -> None:
    """Top-k, log_z, log_tail, entropy and projected states of ``rows`` are those of the teacher's own logits."""
    for row, logprobs_NV, hidden_ND in forward(teacher, rows):
        targets = row.targets
        found_NK = np.take_along_axis(logprobs_NV, targets.topk_ids.astype(np.int64), axis=1)
        assert np.abs(targets.topk_logprobs - found_NK).max() <= 2e-3
        # Equal ids except ties: what was kept is as likely as what ought to be kept.
        best_NK = -np.sort(-logprobs_NV, axis=1)[:, :K]
        assert np.abs(found_NK - best_NK).max() <= 1e-4
        assert all(len(set(ids)) == K for ids in targets.topk_ids.tolist())
        for j, temperature in enumerate(TEMPERATURES):
            scaled_NV = logprobs_NV / temperature
            log_z_N = np.log(np.exp(scaled_NV).sum(1))
            assert np.abs(targets.log_z[:, j] - log_z_N).max() <= 1e-4
            probs_NV = np.exp(scaled_NV - log_z_N[:, None])
            np.put_along_axis(probs_NV, targets.topk_ids.astype(np.int64), 0.0, axis=1)
            tail_N = probs_NV.sum(1)
            assert np.abs(targets.log_tail[:, j] - np.log(tail_N))[tail_N > 1e-6].max() <= 1e-3
        entropy_N = -(np.exp(logprobs_NV) * logprobs_NV).sum(1)
        assert np.abs(targets.entropy - entropy_N).max() <= 1e-3
        projection = cache.projection
        assert projection is not None
        expected = projection.quantise((hidden_ND - projection.mean_D) @ projection.down_RD.T)
        for bits, values in expected.items():
            # A coordinate on the edge of two levels may fall to either side.
            assert np.abs(targets.hidden[bits].astype(int) - values).max() <= 1
            assert (targets.hidden[bits] != values).mean() < 0.01
