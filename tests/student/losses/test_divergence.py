"""Protects the divergences: value and gradient against dense float64, both tails, T², limits, and the default."""

import dataclasses

import pytest
import torch

from distill.config import StageConfig
from distill.student.losses.divergence import FORWARD, Divergence
from distill.student.losses.fused import fused_head_losses
from distill.student.losses.kl import TeacherTargets, forward_kl

CASES = [("forward", 0.5), ("reverse", 0.5), ("js", 0.5), ("js", 0.1), ("skew", 0.1), ("skew", 0.7)]


def tail_logits(problem):
    targets = problem.targets
    return None if targets.tail is None else targets.tail.logits(targets.coords)


def dense(problem, logits_NV, name, beta):
    """T² D of each token by the book: all probabilities are formed in float64."""
    teacher = problem.targets.teacher
    p_NC, q_NC = problem.teacher_p, (logits_NV / teacher.temperature).softmax(1)
    if problem.tail == "bucket":
        uncached_NV = torch.ones_like(p_NC).scatter(1, teacher.topk_ids, 0.0)
        p_NC, q_NC = (
            torch.cat([values.gather(1, teacher.topk_ids), (values * uncached_NV).sum(1, keepdim=True)], 1)
            for values in (p_NC, q_NC)
        )

    def kl(a_NC, b_NC):
        return (a_NC * (a_NC.clamp(min=1e-300).log() - b_NC.clamp(min=1e-300).log())).sum(1)

    m_NC = beta * p_NC + (1 - beta) * q_NC
    value_N = {
        "forward": lambda: kl(p_NC, q_NC),
        "reverse": lambda: kl(q_NC, p_NC),
        "js": lambda: beta * kl(p_NC, m_NC) + (1 - beta) * kl(q_NC, m_NC),
        "skew": lambda: kl(p_NC, m_NC),
    }[name]()
    return teacher.temperature**2 * value_N


@pytest.mark.parametrize(("name", "beta"), CASES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_and_gradient_equal_the_dense_reference(make_problem, tail, temperature, name, beta):
    problem = make_problem(tail=tail, temperature=temperature, vocab=1501, padded=1504)
    exact_NV = problem.logits(torch.float64)[2].detach().requires_grad_()
    logits_NV = exact_NV.detach().float().requires_grad_()
    want_N = dense(problem, exact_NV, name, beta)
    got_N = Divergence(name=name, beta=beta)(logits_NV, problem.targets.teacher, tail_logits(problem))
    want_N.sum().backward()
    got_N.sum().backward()
    assert want_N.mean() > 0.05  # the comparison is not one of zeros
    torch.testing.assert_close(got_N.double(), want_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_NV.grad.double(), exact_NV.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_the_fused_head_computes_the_divergence_it_is_given(make_problem, tail, name, beta):
    problem = make_problem(tail=tail, temperature=2.0, num_tokens=9, vocab=1501, padded=1504)
    hidden_ND = problem.hidden.detach().requires_grad_()
    targets = dataclasses.replace(problem.targets, divergence=Divergence(name=name, beta=beta))
    losses = fused_head_losses(hidden_ND, problem.head, targets, kl_weight=1.0, ce_weight=0.0, chunk=4)
    losses.weighted.backward()
    exact_ND, _, logits_NV = problem.logits(torch.float64)
    want = dense(problem, logits_NV, name, beta).sum()
    want.backward()
    torch.testing.assert_close(losses.kl.double(), want.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden_ND.grad.double(), exact_ND.grad, rtol=1e-3, atol=1e-5)


def test_the_default_is_the_forward_divergence_bit_for_bit(make_problem, tail):
    problem = make_problem(tail=tail, temperature=2.0, num_tokens=9)
    arguments = (problem.logits(torch.float32)[2].detach(), problem.targets.teacher, tail_logits(problem))
    assert torch.equal(FORWARD(*arguments), forward_kl(*arguments))
    assert problem.targets.divergence is FORWARD


def test_js_is_symmetric_and_bounded():
    """At β = 1/2 swapping teacher and student changes nothing, and the divergence stays below log 2."""
    generator = torch.Generator().manual_seed(3)
    a_NV, b_NV = (
        (6 * torch.randn(5, 7, generator=generator, dtype=torch.float64)).log_softmax(1).sort(descending=True)[0]
        for _ in range(2)
    )
    js = Divergence(name="js", beta=0.5)
    ids_NV = torch.arange(7).expand(5, 7)

    def between(teacher_NV, student_NV):
        log_tail_N = torch.full((5,), -100.0)
        targets = TeacherTargets(topk_ids=ids_NV, topk_log_p=teacher_NV, log_tail=log_tail_N, temperature=1.0)
        return js(student_NV, targets, None)

    torch.testing.assert_close(between(a_NV, b_NV), between(b_NV, a_NV))
    assert 0 < between(a_NV, b_NV).max() < torch.log(torch.tensor(2.0))


@pytest.mark.parametrize(("name", "beta"), CASES)
@pytest.mark.parametrize("with_tail_logits", [True, False])
def test_finite_where_teacher_and_student_are_certain_of_different_tokens(name, beta, with_tail_logits):
    targets = TeacherTargets(
        topk_ids=torch.tensor([[3, 1]]),
        topk_log_p=torch.tensor([[0.0, -90.0]]),
        log_tail=torch.tensor([-100.0]),
        temperature=1.0,
    )
    z_NV = torch.full((1, 50), -3e4).index_fill(1, torch.tensor([7]), 3e4).requires_grad_()
    loss_N = Divergence(name=name, beta=beta)(z_NV, targets, torch.randn(1, 50) if with_tail_logits else None)
    loss_N.sum().backward()
    assert torch.isfinite(loss_N).all()
    assert torch.isfinite(z_NV.grad).all()


@pytest.mark.parametrize(("name", "beta"), [("js", 0.5), ("skew", 0.1), ("forward", 0.5)])
def test_beta_has_the_default_of_its_paper(name, beta):
    stage = StageConfig(
        shares={"a": 1}, temperature=1, weights={"kl": 1}, learning_rate=1, epochs=1, batch_size=1, divergence=name
    )
    assert Divergence.of(stage) == Divergence(name=name, beta=beta)
    assert Divergence.of(stage.model_copy(update={"beta": 0.3})).beta == 0.3
