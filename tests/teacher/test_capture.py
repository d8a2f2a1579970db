"""Capture maths against float64: top-k, log_z, log_tail, entropy, with and without vocabulary slices.

What it protects: every number a student will ever see of its teacher.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch

from distill.cache.projection import Projection
from distill.teacher.capture import (
    LOG_TAIL_FLOOR,
    Head,
    LocalStatistics,
    Projector,
    Spec,
    Statistics,
    can_compile,
    largest,
    local_statistics,
    merge,
    statistics,
)
from distill.teacher.chunks import Chunks

SPEC = Spec(top_k=64, temperatures=(4.0, 2.0, 1.0))


def in_chunks(rows: int) -> Chunks:
    """So many positions at a time."""
    chunks = Chunks(5003, torch.device("cpu"))
    chunks.rows = rows
    return chunks


def _case(rows: int = 5003, *, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    weight_VD = torch.randn(rows, 48, generator=generator) * 0.4 * scale
    return weight_VD, torch.randn(37, 48, generator=generator)


def _reference(logits_NV: torch.Tensor, spec: Spec) -> dict[str, torch.Tensor]:
    logits_NV = logits_NV.double()
    logprobs_NV = logits_NV.log_softmax(1)
    top_NK, ids_NK = logprobs_NV.topk(spec.top_k, dim=1)
    log_z, log_tail = [], []
    for temperature in spec.temperatures:
        at_NV = logprobs_NV / temperature
        log_z.append(at_NV.logsumexp(1))
        tail_NV = at_NV.log_softmax(1).scatter(1, ids_NK, -torch.inf)
        log_tail.append(tail_NV.logsumexp(1))
    return {
        "topk_ids": ids_NK,
        "topk_logprobs": top_NK,
        "log_z": torch.stack(log_z, 1),
        "log_tail": torch.stack(log_tail, 1),
        "entropy": -(logprobs_NV.exp() * logprobs_NV).sum(1),
    }


def _assert_exact(found: Statistics, logits_NV: torch.Tensor, spec: Spec) -> None:
    expected = _reference(logits_NV, spec)
    assert torch.equal(found.topk_ids.long(), expected["topk_ids"])
    for name, tolerance in {"topk_logprobs": 2e-5, "log_z": 2e-5, "entropy": 2e-5}.items():
        assert torch.allclose(getattr(found, name).double(), expected[name], atol=tolerance, rtol=1e-6), name
    seen = expected["log_tail"] > np.log(1e-6)
    assert (found.log_tail.double() - expected["log_tail"])[seen].abs().max() < 1e-4


@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("temperatures", [(4.0, 2.0, 1.0), (1.0,), (2.0,), (3.0, 0.5), (8.0, 2.0, 1.0)])
def test_statistics_equal_a_float64_reference(temperatures: tuple[float, ...], chunk: int) -> None:
    weight_VD, hidden_ND = _case()
    spec = Spec(top_k=64, temperatures=temperatures)
    found = statistics(Head(weight_VD, num_ids=len(weight_VD)), hidden_ND, spec, chunks=in_chunks(chunk))
    _assert_exact(found, hidden_ND @ weight_VD.T, spec)


def test_the_compiled_pass_equals_the_plain_one() -> None:
    """In float32 and bfloat16; ties at the edge of the top-k, of which bfloat16 has many, count once each."""
    assert can_compile(torch.device("cpu"))
    weight_VD, hidden_ND = _case()
    for weight, float32 in ((weight_VD, True), (weight_VD.bfloat16(), False)):
        plain = Head(weight, num_ids=5003, float32=float32)
        compiled = Head(weight, num_ids=5003, float32=float32, compiled=True)
        expected = statistics(plain, hidden_ND.to(weight.dtype), SPEC, chunks=in_chunks(16))
        found = statistics(compiled, hidden_ND.to(weight.dtype), SPEC, chunks=in_chunks(16))
        for name in ("topk_logprobs", "log_z", "log_tail", "entropy"):
            assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5), name
        logits_NV = plain.logits(hidden_ND.to(weight.dtype)).float()
        at_edge = logits_NV == logits_NV.topk(SPEC.top_k, dim=1).values[:, -1:]
        assert float32 or (at_edge.sum(1) > 1).any(), "the case must hold ties"
        assert (found.log_z.double() - _reference(logits_NV, SPEC)["log_z"]).abs().max() < 2e-5
        assert (found.log_tail.double() - _reference(logits_NV, SPEC)["log_tail"]).abs().max() < 1e-4


def test_a_tiny_tail_keeps_its_relative_precision() -> None:
    weight_VD, hidden_ND = _case(scale=4.0)
    logits_NV = (hidden_ND @ weight_VD.T).double()
    found = statistics(Head(weight_VD, num_ids=len(weight_VD)), hidden_ND, SPEC, chunks=in_chunks(64))
    expected = _reference(logits_NV, SPEC)["log_tail"]
    assert expected[:, 2].min() < np.log(1e-8), "the case must hold tails far below float32's epsilon"
    assert (found.log_tail[:, 2].double() - expected[:, 2]).abs().max() < 1e-4


@pytest.mark.parametrize("bounds", [(0, 2500, 5003), (0, 1000, 4980, 5003)])
def test_vocabulary_slices_merge_to_the_whole(bounds: tuple[int, ...]) -> None:
    """The last slice holds fewer ids than k: its padding must not leak."""
    weight_VD, hidden_ND = _case()
    parts = []
    for first, last in pairwise(bounds):
        head = Head(weight_VD[first:last], first_id=first, num_ids=last - first)
        packed = local_statistics(head, hidden_ND, SPEC).packed()
        parts.append(LocalStatistics.unpacked(packed, SPEC))
    _assert_exact(merge(parts, SPEC), hidden_ND @ weight_VD.T, SPEC)


def test_padded_rows_bias_scale_and_soft_cap() -> None:
    weight_VD, hidden_ND = _case()
    bias_V = torch.linspace(-1, 1, len(weight_VD))
    real = 4990
    head = Head(weight_VD, num_ids=real, bias=bias_V, soft_cap=8.0, scale=1.5)
    logits_NV = 1.5 * 8.0 * torch.tanh((hidden_ND @ weight_VD.T + bias_V) / 8.0)
    found = statistics(head, hidden_ND, SPEC, chunks=in_chunks(16))
    assert int(found.topk_ids.max()) < real
    _assert_exact(found, logits_NV[:, :real], SPEC)


def test_k_of_the_whole_vocabulary_leaves_the_floor_as_tail() -> None:
    weight_VD, hidden_ND = _case(rows=32)
    spec = Spec(top_k=32, temperatures=(2.0, 1.0))
    found = statistics(Head(weight_VD, num_ids=32), hidden_ND, spec, chunks=in_chunks(16))
    assert torch.all(found.log_tail == LOG_TAIL_FLOOR)
    assert torch.isfinite(found.entropy).all()
    assert torch.allclose(found.topk_logprobs.exp().sum(1), torch.ones(len(hidden_ND)), atol=1e-5)


@pytest.mark.parametrize("width", [4096, 5003, 20000])
def test_blocked_top_k_is_exact_even_with_ties(width: int) -> None:
    x_NV = torch.randn(9, width, generator=torch.Generator().manual_seed(width)).round(decimals=1)
    values, ids = largest(x_NV, 16)
    assert torch.equal(values, x_NV.topk(16, dim=1).values)
    assert torch.equal(x_NV.gather(1, ids), values)
    assert all(len(set(row)) == 16 for row in ids.tolist())


def test_a_bfloat16_head_errs_no_more_than_its_own_rounding() -> None:
    weight_VD, hidden_ND = _case()
    weight_VD, hidden_ND = weight_VD.bfloat16(), hidden_ND.bfloat16()
    exact_NV = hidden_ND.float() @ weight_VD.float().T
    _assert_exact(statistics(Head(weight_VD, num_ids=5003), hidden_ND, SPEC, chunks=in_chunks(64)), exact_NV, SPEC)
    low = statistics(Head(weight_VD, num_ids=5003, float32=False), hidden_ND, SPEC, chunks=in_chunks(64))
    own_error = ((hidden_ND @ weight_VD.T).float() - exact_NV).abs().max()
    assert (low.log_z.double() - _reference(exact_NV, SPEC)["log_z"]).abs().max() <= 2 * own_error


def test_projector_equals_the_numpy_quantiser() -> None:
    generator = np.random.default_rng(0)
    widths = ((6, 8), (4, 16), (2, 24))
    projection = Projection(
        mean_D=generator.normal(size=48).astype(np.float32),
        down_RD=generator.normal(size=(48, 48)).astype(np.float32) / 7,
        basis_VR=np.zeros((10, 48), np.float16),
        bias_V=np.zeros(10, np.float32),
        variance_R=np.ones(48, np.float32),
        widths=widths,
        logit_scale=1.0,
        soft_cap=None,
        explained=1.0,
    )
    hidden_ND = generator.normal(size=(200, 48)).astype(np.float32)
    expected = projection.quantise((hidden_ND - projection.mean_D) @ projection.down_RD.T)
    found = Projector(projection, torch.device("cpu"))(torch.from_numpy(hidden_ND))
    for bits, count in widths:
        values = found[bits].numpy()
        assert values.shape == (200, count)
        # A coordinate on a boundary may fall to either side: products are summed in another order.
        assert np.abs(values.astype(int) - expected[bits]).max() <= 1
        assert (values != expected[bits]).mean() < 1e-3
