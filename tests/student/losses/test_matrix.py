"""Protects every way to combine the losses of the head: value and gradient against dense float64, and their floors.

Divergence, tail, temperature and cross-entropy, with a vocabulary that is padded on the student's side to a size of its
own, in the dtypes that students train in.
"""

import dataclasses
import itertools

import pytest
import torch

from distill.student.losses.ce import cross_entropy
from distill.student.losses.divergence import Divergence
from distill.student.losses.fused import fused_head_losses

DIVERGENCES = [("forward", 0.5), ("reverse", 0.5), ("js", 0.5), ("js", 0.2), ("skew", 0.1)]
WEIGHTS = [(1.0, 0.0), (0.7, 0.3)]


def categories(problem, logits_NV):
    """Teacher's and student's probabilities of each id, or of the cached ids and of all others together."""
    teacher = problem.targets.teacher
    p_NC, q_NC = problem.teacher_p, (logits_NV / teacher.temperature).softmax(1)
    if problem.tail == "low_rank":
        return p_NC, q_NC
    rest_NV = torch.ones_like(p_NC).scatter(1, teacher.topk_ids, 0.0)
    both = (p_NC, q_NC)
    return tuple(torch.cat([x.gather(1, teacher.topk_ids), (x * rest_NV).sum(1, keepdim=True)], 1) for x in both)


def dense(problem, logits_NV, name, beta):
    """Σ T² D by the book."""
    p_NC, q_NC = categories(problem, logits_NV)

    def kl(a_NC, b_NC):
        return (a_NC * (a_NC.clamp(min=1e-300).log() - b_NC.clamp(min=1e-300).log())).sum()

    m_NC = beta * p_NC + (1 - beta) * q_NC
    values = {
        "forward": lambda: kl(p_NC, q_NC),
        "reverse": lambda: kl(q_NC, p_NC),
        "js": lambda: beta * kl(p_NC, m_NC) + (1 - beta) * kl(q_NC, m_NC),
        "skew": lambda: kl(p_NC, m_NC),
    }
    return problem.targets.teacher.temperature**2 * values[name]()


@pytest.mark.parametrize(("name", "beta"), DIVERGENCES)
@pytest.mark.parametrize("padded", [331, 384])
def test_every_combination_equals_the_dense_reference(make_problem, tail, name, beta, padded):
    for temperature, (kl_weight, ce_weight) in itertools.product((1.0, 2.0, 4.0), WEIGHTS):
        problem = make_problem(tail=tail, temperature=temperature, num_tokens=11, vocab=331, padded=padded, top_k=16)
        hidden_ND, weight_HD = problem.hidden.requires_grad_(), problem.head.weight.requires_grad_()
        targets = dataclasses.replace(problem.targets, divergence=Divergence(name=name, beta=beta))
        got = fused_head_losses(hidden_ND, problem.head, targets, kl_weight=kl_weight, ce_weight=ce_weight, chunk=4)
        got.weighted.backward()
        exact_ND, exact_HD, logits_NV = problem.logits(torch.float64)
        kl = dense(problem, logits_NV, name, beta)
        ce = torch.nn.functional.cross_entropy(logits_NV, problem.targets.labels, reduction="sum")
        (kl_weight * kl + ce_weight * ce).backward()
        torch.testing.assert_close(got.kl.double(), kl.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(hidden_ND.grad.double(), exact_ND.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(weight_HD.grad.double(), exact_HD.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "beta"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_each_divergence_alone_goes_down_to_zero(make_problem, tail, name, beta, temperature):
    """Logits of their own for each token can equal the teacher, up to the rounding of what is cached."""
    problem = make_problem(
        tail=tail, temperature=temperature, num_tokens=4, vocab=61, padded=64, top_k=8, student_size=4
    )
    targets = problem.targets
    tail_NV = None if targets.tail is None else targets.tail.logits(targets.coords)
    divergence = Divergence(name=name, beta=beta)
    z_NV = torch.zeros(4, 61, requires_grad=True)
    optimizer = torch.optim.Adam([z_NV], lr=0.3)
    values = []
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 600)
        optimizer.zero_grad()
        loss = divergence(z_NV, targets.teacher, tail_NV).mean()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] > 0.05
    assert abs(values[-1]) < 0.01 * values[0] + 2e-3 * temperature**2


def test_cross_entropy_alone_goes_down_to_zero():
    z_NV = torch.zeros(4, 61, requires_grad=True)
    optimizer = torch.optim.Adam([z_NV], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        loss = cross_entropy(z_NV, torch.arange(4)).mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
