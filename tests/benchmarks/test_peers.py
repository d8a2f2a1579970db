"""The comparison with other tools: codecs give back what they were given, errors are right, the page has the numbers.

What it protects: docs/peers.md and benchmarks/results/peers-smollm2-135m.json.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.peer_codecs import RandomSampling, TopK, loaded, spread, stored

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peers-smollm2-135m.json"
NUM, VOCAB = 64, 300


@pytest.fixture
def truth() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (4 * torch.randn(NUM, VOCAB, generator=generator)).log_softmax(1)


def decoded(peer: Any, truth_NV: torch.Tensor) -> Any:
    columns = peer.encode(peer.prepare(truth_NV))
    return peer.decode(loaded(stored(columns), {name: values.shape for name, values in columns.items()}))


def test_draws_come_back_as_their_histogram(truth: torch.Tensor) -> None:
    peer = RandomSampling(draws=50)
    drawn_NS = peer.prepare(truth)
    expected_NV = np.stack([np.bincount(row, minlength=VOCAB) for row in drawn_NS]) / 50
    got = decoded(peer, truth)
    assert np.allclose(peer.target(got, slice(0, NUM), 1.0, VOCAB), expected_NV)
    assert np.allclose(peer.target(got, slice(10, 20), 1.0, VOCAB), expected_NV[10:20])
    softer = peer.target(got, slice(0, NUM), 4.0, VOCAB)
    assert np.allclose(softer.sum(1), 1)
    assert np.array_equal(softer > 0, expected_NV > 0)


def test_many_draws_are_unbiased(truth: torch.Tensor) -> None:
    peer = RandomSampling(draws=50)
    one = truth[:1].expand(4000, VOCAB)
    mean_V = peer.target(decoded(peer, one), slice(0, 4000), 1.0, VOCAB).mean(0)
    assert np.abs(mean_V - truth[0].exp().numpy()).sum() / 2 < 0.01


def test_a_whole_top_k_is_the_teacher_at_every_temperature(truth: torch.Tensor) -> None:
    peer = TopK(top_k=VOCAB)
    got = decoded(peer, truth)
    for temperature in (1.0, 2.0, 4.0):
        assert np.allclose(
            peer.target(got, slice(0, NUM), temperature, VOCAB), peers.tempered(truth, temperature), atol=2e-3
        )


def test_what_is_not_kept_is_spread_evenly() -> None:
    got = spread(np.array([[3, 1]]), np.array([[0.5, 0.2]]), 5)
    assert np.allclose(got, [[0.1, 0.2, 0.1, 0.5, 0.1]])


def test_errors_are_zero_for_the_truth_and_known_for_uniform(
    truth: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "NUM_MEASURED", NUM)
    exact = peers.errors(truth, lambda positions, temperature: peers.tempered(truth[positions], temperature))
    assert set(exact["tv"].values()) == set(exact["tv_of_mean"].values()) == {0.0}
    uniform = peers.errors(truth, lambda positions, _: np.full((positions.stop - positions.start, VOCAB), 1 / VOCAB))
    expected = 0.5 * np.abs(truth.exp().numpy() - 1 / VOCAB).sum(1).mean()
    assert uniform["tv"]["1"] == pytest.approx(expected, abs=1e-4)
    assert uniform["tv_of_mean"]["1"] < uniform["tv"]["1"]


def test_the_page_has_the_measured_numbers() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    assert peers.table(results) in page
    assert peers.steps_table(results) in page
    ours, renormalised = results["codecs"][peers.OURS], results["codecs"][TopK().name]
    for temperature in ("1", "2", "4"):
        assert ours["tv"][temperature] < renormalised["tv"][temperature]
