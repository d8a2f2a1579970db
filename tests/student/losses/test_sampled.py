"""Protects training on ids drawn from the teacher: which position a draw is of, value, gradient, no bias, its floor."""

import dataclasses

import pytest
import torch

from distill.student.losses.fused import fused_head_losses
from distill.student.losses.sampled import SampledTargets, sampled_kl

NUM_SAMPLES, VOCAB = 12, 41


def drawn(log_p_NV, *, num=NUM_SAMPLES, seed=0):
    """Flat ids and counts as a cache keeps them, and the draws' shares as a dense matrix."""
    generator = torch.Generator().manual_seed(seed)
    rows_ND = torch.multinomial(log_p_NV.exp(), num, replacement=True, generator=generator)
    pairs = [row.unique(return_counts=True) for row in rows_ND]
    dense_NV = torch.zeros(log_p_NV.shape, dtype=torch.float64)
    for row, (ids, counts) in zip(dense_NV, pairs, strict=True):
        row[ids] = counts.double() / num
    return torch.cat([ids for ids, _ in pairs]).int(), torch.cat([c for _, c in pairs]).short(), dense_NV


def teacher(num_tokens, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num_tokens, VOCAB, generator=generator, dtype=torch.float64)).log_softmax(1)


def entropy_of(log_p_NV):
    return -(log_p_NV.exp() * log_p_NV).sum(1).float()


def test_flat_draws_are_given_back_to_their_positions():
    log_p_NV = teacher(9)
    ids_J, counts_J, dense_NV = drawn(log_p_NV)
    targets = SampledTargets.of(ids_J, counts_J, entropy_of(log_p_NV))
    assert targets.ids.shape[1] < VOCAB
    got_NV = torch.zeros(9, VOCAB, dtype=torch.float64).scatter_add(1, targets.ids, targets.weights.double())
    torch.testing.assert_close(got_NV, dense_NV, rtol=1e-6, atol=1e-7)
    part = targets.rows(2, 5)
    assert torch.equal(part.ids, targets.ids[2:5])
    assert torch.equal(part.entropy, targets.entropy[2:5])


@pytest.mark.parametrize(("kl_weight", "ce_weight"), [(1.0, 0.0), (0.7, 0.3)])
@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("scale_and_cap", [(1.0, None), (0.5, 4.0)])
def test_the_fused_head_equals_the_dense_reference(make_problem, kl_weight, ce_weight, chunk, scale_and_cap):
    """Also where the label is among the drawn ids, and with a head of more rows than there are ids."""
    problem = make_problem(tail="bucket", temperature=1.0, num_tokens=9, vocab=VOCAB, padded=48, top_k=8)
    log_p_NV = teacher(9)
    ids_J, counts_J, dense_NV = drawn(log_p_NV)
    targets = SampledTargets.of(ids_J, counts_J, entropy_of(log_p_NV))
    labels_N = torch.where(torch.arange(9) % 2 == 0, dense_NV.argmax(1), dense_NV.argmin(1))
    (scale, cap), weight_HD = scale_and_cap, problem.head.weight.detach().requires_grad_()
    head = dataclasses.replace(problem.head, weight=weight_HD, scale=scale, soft_cap=cap)
    hidden_ND = problem.hidden.detach().requires_grad_()
    both = dataclasses.replace(problem.targets, teacher=targets, labels=labels_N)
    losses = fused_head_losses(hidden_ND, head, both, kl_weight=kl_weight, ce_weight=ce_weight, chunk=chunk)
    losses.weighted.backward()
    exact_ND, exact_HD, raw_NV = problem.logits(torch.float64)
    log_q_NV = (scale * (raw_NV if cap is None else cap * torch.tanh(raw_NV / cap))).log_softmax(1)
    kl = -(dense_NV * log_q_NV).sum() - entropy_of(log_p_NV).double().sum()
    (kl_weight * kl - ce_weight * log_q_NV.gather(1, labels_N.unsqueeze(1)).sum()).backward()
    torch.testing.assert_close(losses.kl.double(), kl.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden_ND.grad.double(), exact_ND.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weight_HD.grad.double(), exact_HD.grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        same = fused_head_losses(hidden_ND, head, both, kl_weight=kl_weight, ce_weight=ce_weight, chunk=chunk)
    torch.testing.assert_close(same.weighted, losses.weighted.detach())


def test_many_draws_tend_to_the_divergence_itself():
    log_p_NV, z_NV = teacher(3), torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5))
    ids_J, counts_J, _ = drawn(log_p_NV, num=20_000)
    targets = SampledTargets.of(ids_J, counts_J, entropy_of(log_p_NV))
    want_N = (log_p_NV.exp() * (log_p_NV - z_NV.double().log_softmax(1))).sum(1)
    torch.testing.assert_close(sampled_kl(z_NV, targets).double(), want_N, rtol=0, atol=0.06)


def test_alone_it_goes_down_to_the_entropy_of_the_draws():
    """The best student says each id as often as it was drawn: then -Σ w log q is the draws' own entropy."""
    log_p_NV = teacher(6)
    ids_J, counts_J, dense_NV = drawn(log_p_NV)
    targets = SampledTargets.of(ids_J, counts_J, entropy_of(log_p_NV))
    z_NV = torch.zeros(6, VOCAB, requires_grad=True)
    optimizer = torch.optim.Adam([z_NV], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        sampled_kl(z_NV, targets).sum().backward()
        optimizer.step()
    floor_N = -(dense_NV * dense_NV.clamp(min=1e-30).log()).sum(1) - entropy_of(log_p_NV)
    above_N = sampled_kl(z_NV, targets).detach().double() - floor_N
    assert (above_N > -1e-5).all()
    assert above_N.max() < 0.01
