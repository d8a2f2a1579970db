"""Protects the contrastive loss: value and gradient against float64, duplicates, a batch of one, always finite."""

import pytest
import torch

from distill.student.losses.contrastive import TeacherVectors, contrastive_loss, sequence_means


def vectors(num, *, seed, rank=12):
    return torch.randn(num, rank, generator=torch.Generator().manual_seed(seed))


def told(vectors_MR, keys_M, domains_M=None):
    domains_M = torch.zeros_like(keys_M) if domains_M is None else domains_M
    return TeacherVectors(vectors=vectors_MR, keys=keys_M, domains=domains_M)


def loss_of(student_BR, own, candidates, *, temperature, negatives="all"):
    return contrastive_loss(student_BR, own, candidates, temperature=temperature, negatives=negatives)


def dense(student_BR, teacher_MR, keys, domains, rows, temperature):
    """By the book, one sequence after the other, in float64."""
    losses = []
    for row in rows:
        same = torch.cosine_similarity(student_BR[row], teacher_MR[row], dim=0) / temperature
        others = [
            torch.cosine_similarity(student_BR[row], teacher_MR[other], dim=0) / temperature
            for other in range(len(keys))
            if keys[other] != keys[row] and domains[other] == domains[row]
        ]
        losses.append(-(same.exp() / (same.exp() + sum(other.exp() for other in others))).log())
    return torch.stack(losses)


@pytest.mark.parametrize("domains", [None, [0, 1, 1, 1, 0]])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_value_and_gradient_equal_the_reference_with_duplicates_masked(temperature, domains):
    keys = torch.tensor([1, 2, 3, 2, 4])
    teacher_MR = vectors(5, seed=1)
    teacher_MR[3] = teacher_MR[1]
    exact = vectors(5, seed=2).double().requires_grad_()
    student = exact.detach().float().requires_grad_()
    among_M = None if domains is None else torch.tensor(domains)
    candidates = told(teacher_MR, keys, among_M)
    rows = [0, 1, 3]  # a micro-batch of the step
    ours = told(teacher_MR[rows], keys[rows], None if among_M is None else among_M[rows])
    got_B = loss_of(
        student[rows], ours, candidates, temperature=temperature, negatives="all" if domains is None else "domain"
    )
    want_B = dense(exact, teacher_MR.double(), keys.tolist(), domains or [0] * 5, rows, temperature)
    torch.testing.assert_close(got_B.double(), want_B, rtol=1e-4, atol=1e-5)
    got_B.sum().backward()
    want_B.sum().backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)


def test_a_batch_of_one_and_a_batch_of_duplicates_give_zero():
    for num in (1, 4):
        teacher_MR, keys = vectors(1, seed=1).expand(num, -1), torch.full((num,), 7)
        student = vectors(num, seed=2).requires_grad_()
        candidates = told(teacher_MR, keys)
        losses_B = loss_of(student, told(teacher_MR, keys), candidates, temperature=0.1)
        losses_B.sum().backward()
        assert (losses_B == 0).all()
        assert (student.grad == 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_finite_for_vectors_of_any_length(scale):
    teacher_MR, keys = scale * vectors(3, seed=1), torch.arange(3)
    student = (scale * vectors(3, seed=2)).requires_grad_()
    candidates = told(teacher_MR, keys)
    losses_B = loss_of(student, told(teacher_MR, keys), candidates, temperature=0.05)
    losses_B.sum().backward()
    assert torch.isfinite(losses_B).all()
    assert torch.isfinite(student.grad).all()


def test_means_are_over_the_tokens_of_each_sequence():
    values_NR = torch.arange(10.0).reshape(5, 2)
    means_BR = sequence_means(values_NR.bfloat16(), torch.tensor([0, 0, 2, 2, 2]), 3)
    assert means_BR.tolist() == [[1.0, 2.0], [0.0, 0.0], [6.0, 7.0]]
    assert means_BR.dtype == torch.float32


def test_alone_it_goes_down_to_what_the_teachers_own_vectors_reach():
    """Its floor is at or below the loss of a student whose vectors are the teacher's."""
    teacher_MR, keys = vectors(6, seed=1, rank=8), torch.arange(6)
    candidates = told(teacher_MR, keys)
    student = vectors(6, seed=2, rank=8).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.05)
    values = []
    for _ in range(1500):
        optimizer.zero_grad()
        loss = loss_of(student, told(teacher_MR, keys), candidates, temperature=0.1).mean()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    reached = loss_of(teacher_MR, told(teacher_MR, keys), candidates, temperature=0.1).mean().item()
    assert values[0] > 1.0
    assert values[-1] < reached + 1e-3


def test_cosines_keep_float32_under_autocast():
    teacher_MR, student_MR, keys = vectors(6, seed=3), vectors(6, seed=4), torch.arange(6)
    candidates = told(teacher_MR, keys)
    exact_B = loss_of(student_MR, told(teacher_MR, keys), candidates, temperature=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss_of(student_MR, told(teacher_MR, keys), candidates, temperature=0.1), exact_B)
