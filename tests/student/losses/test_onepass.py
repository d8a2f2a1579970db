"""Protects the pass that writes the gradient out: compiled and not, in both dtypes, with the label anywhere."""

import dataclasses
import shutil

import pytest
import torch

from distill.student.losses import onepass
from distill.student.losses.fused import fused_head_losses
from distill.student.losses.kl import TeacherTargets


def run(problem, *, labels_N, chunk=8):
    hidden_ND = problem.hidden.detach().requires_grad_()
    targets = dataclasses.replace(problem.targets, labels=labels_N)
    losses = fused_head_losses(hidden_ND, problem.head, targets, kl_weight=0.7, ce_weight=0.3, chunk=chunk)
    losses.weighted.backward()
    return losses, hidden_ND.grad


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
def test_the_compiled_pass_is_the_plain_one(make_problem, monkeypatch):
    problem = make_problem(tail="low_rank", temperature=2.0, num_tokens=12, vocab=16400, padded=16448, top_k=32)
    labels_N = problem.targets.labels
    monkeypatch.setattr(onepass, "_worth_compiling", lambda _logits: True)
    compiled, compiled_grad = run(problem, labels_N=labels_N)
    monkeypatch.setattr(onepass, "_worth_compiling", lambda _logits: False)
    plain, plain_grad = run(problem, labels_N=labels_N)
    torch.testing.assert_close(compiled.weighted, plain.weighted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled_grad, plain_grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("place", ["first", "last", "tail"])
def test_the_label_may_be_any_id(make_problem, dense_kl, tail, place):
    """Among the top-k, and outside of it, where its probability comes from the tail."""
    problem = make_problem(tail=tail, temperature=4.0, num_tokens=9, vocab=301, padded=304, top_k=8)
    ids_NK = problem.targets.teacher.topk_ids
    least_N = problem.teacher_p.argmin(1)
    labels_N = {"first": ids_NK[:, 0], "last": ids_NK[:, -1], "tail": least_N}[place]
    losses, grad_ND = run(problem, labels_N=labels_N)
    exact_ND, _, logits_NV = problem.logits(torch.float64)
    ce = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    want = 0.7 * dense_kl(problem, logits_NV).sum() + 0.3 * ce
    want.backward()
    torch.testing.assert_close(losses.weighted.double(), want.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad_ND.double(), exact_ND.grad, rtol=1e-3, atol=1e-5)


def test_a_student_that_is_sure_of_its_label_has_a_gradient():
    """A logit 200 above the others: its share of the tail would be exp(200), though it is in the top-k."""
    logits_NV = torch.zeros(1, 40)
    logits_NV[0, 3] = 200.0
    teacher = TeacherTargets(
        topk_ids=torch.tensor([[3, 7]]),
        topk_log_p=torch.tensor([[0.6, 0.3]]).log(),
        log_tail=torch.tensor([0.1]).log(),
        temperature=1.0,
    )
    targets = onepass.ChunkTargets(
        teacher=teacher, labels=torch.tensor([3]), tail_logits=None, tail_bias=None, kl_weight=1.0, ce_weight=1.0
    )
    found = onepass.losses_with_gradient(logits_NV, targets, dtype=torch.float32)
    leaf_NV = logits_NV.double().requires_grad_()
    log_q_V = leaf_NV[0].log_softmax(0)
    other_V = torch.ones(40, dtype=torch.bool).index_fill(0, teacher.topk_ids[0], False)
    p_3 = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    log_q_3 = torch.stack([log_q_V[3], log_q_V[7], log_q_V[other_V].logsumexp(0)])
    ((p_3 * (p_3.log() - log_q_3)).sum() - log_q_V[3]).backward()
    torch.testing.assert_close(found.gradient.double(), leaf_NV.grad, rtol=1e-5, atol=1e-6)


def test_only_large_vocabularies_are_compiled_for():
    assert not onepass._worth_compiling(torch.zeros(1, 500))
    assert not onepass._worth_compiling(torch.zeros(1, 20_000, dtype=torch.float64))
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++"))
    assert onepass._worth_compiling(torch.zeros(1, 20_000)) == has_compiler
