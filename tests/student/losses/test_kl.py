"""Protects the KL losses: values and gradients against dense float64, both tails, T², and the corners of the tail."""

import numpy as np
import pytest
import torch

from distill.cache.projection import Projection
from distill.student.losses.ce import cross_entropy
from distill.student.losses.kl import TeacherTargets, forward_kl, low_rank_log_probs
from distill.student.losses.tail import TailModel


def tail_logits(problem):
    targets = problem.targets
    return None if targets.tail is None else targets.tail.logits(targets.coords)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_value_and_gradient_equal_the_dense_reference(make_problem, dense_kl, tail, temperature):
    problem = make_problem(tail=tail, temperature=temperature)
    _, _, exact_NV = problem.logits(torch.float64)
    exact_NV = exact_NV.detach().requires_grad_()
    logits_NV = exact_NV.detach().float().requires_grad_()
    want_N, got_N = dense_kl(problem, exact_NV), forward_kl(logits_NV, problem.targets.teacher, tail_logits(problem))
    want_N.sum().backward()
    got_N.sum().backward()
    assert want_N.mean() > 0.5  # the comparison is not one of zeros
    torch.testing.assert_close(got_N.double(), want_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_NV.grad.double(), exact_NV.grad, rtol=1e-3, atol=1e-6)


def test_bfloat16_logits_cost_no_more_than_their_own_rounding(make_problem, dense_kl, tail):
    problem = make_problem(tail=tail, temperature=2.0)
    _, _, exact_NV = problem.logits(torch.float64)
    rounded_NV = exact_NV.detach().to(torch.bfloat16)
    truth_N, reference_N = dense_kl(problem, exact_NV), dense_kl(problem, rounded_NV.double())
    got_N = forward_kl(rounded_NV, problem.targets.teacher, tail_logits(problem)).double()
    own_error = (reference_N - truth_N).abs().max()
    assert (got_N - truth_N).abs().max() < 1.05 * own_error + 1e-4


def test_temperature_scales_by_its_square(make_problem, tail):
    """The loss is T² times the divergence, so that its gradient at large T tends to a limit instead of 1 / T²."""
    problem = make_problem(tail=tail, temperature=4.0, num_tokens=8)
    z_NV = problem.logits(torch.float32)[2].detach()
    targets, tail_NV = problem.targets.teacher, tail_logits(problem)
    unscaled = TeacherTargets(
        topk_ids=targets.topk_ids,
        topk_log_p=targets.topk_log_p,
        log_tail=targets.log_tail,
        temperature=1.0,
    )
    at_one = forward_kl(z_NV / 4, unscaled, None if tail_NV is None else tail_NV / 4)
    torch.testing.assert_close(forward_kl(z_NV, targets, tail_NV), 16 * at_one)


def test_the_top_k_is_never_renormalised(make_problem, tail):
    """A student with all its mass inside the top-k, in the teacher's proportions, is still far from the teacher."""
    problem = make_problem(tail=tail, temperature=4.0, num_tokens=8)
    targets = problem.targets.teacher
    z_NV = torch.full((8, problem.head.vocab_size), -200.0).scatter(1, targets.topk_ids, 4 * targets.topk_log_p)
    assert forward_kl(z_NV, targets, tail_logits(problem)).min() > 16 * 1.0


def test_a_student_equal_to_the_rebuilt_teacher_has_no_loss_and_no_gradient(make_problem, tail):
    problem = make_problem(tail="low_rank", temperature=2.0, num_tokens=16)
    log_p_NV = low_rank_log_probs(tail_logits(problem), problem.targets.teacher)
    z_NV = (2 * log_p_NV).requires_grad_()
    loss_N = forward_kl(z_NV, problem.targets.teacher, tail_logits(problem) if tail == "low_rank" else None)
    loss_N.sum().backward()
    assert loss_N.abs().max() < 0.02  # Σ p is off by the rounding of the cached numbers
    assert z_NV.grad.abs().max() < 1e-3


@pytest.mark.parametrize("with_tail_logits", [True, False])
def test_finite_where_the_teacher_is_certain(with_tail_logits):
    """log_tail at its floor, a student that is certain as well, and huge logits: no NaN, no infinity."""
    targets = TeacherTargets(
        topk_ids=torch.tensor([[3, 1]]),
        topk_log_p=torch.tensor([[0.0, -90.0]]),
        log_tail=torch.tensor([-100.0]),
        temperature=1.0,
    )
    z_NV = torch.full((1, 50), -3e4).index_fill(1, torch.tensor([3]), 3e4).requires_grad_()
    loss_N = forward_kl(z_NV, targets, torch.randn(1, 50) if with_tail_logits else None)
    loss_N.sum().backward()
    assert torch.isfinite(loss_N).all()
    assert torch.isfinite(z_NV.grad).all()


@pytest.mark.parametrize("with_tail_logits", [True, False])
def test_a_top_k_of_the_whole_vocabulary_leaves_no_tail(with_tail_logits):
    z_NV = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher_NV = torch.randn(5, 7).log_softmax(1)
    log_p_NK, ids_NK = teacher_NV.sort(descending=True)
    targets = TeacherTargets(topk_ids=ids_NK, topk_log_p=log_p_NK, log_tail=torch.full((5,), -100.0), temperature=1.0)
    loss_N = forward_kl(z_NV, targets, torch.zeros(5, 7) if with_tail_logits else None)
    want_N = torch.nn.functional.kl_div(
        z_NV.log_softmax(1), teacher_NV.double(), log_target=True, reduction="none"
    ).sum(1)
    torch.testing.assert_close(loss_N, want_N, rtol=1e-6, atol=1e-6)
    loss_N.sum().backward()
    assert torch.isfinite(z_NV.grad).all()


def test_cross_entropy_equals_the_reference():
    z_NV = (torch.randn(9, 501) * 5).to(torch.bfloat16)
    labels_N = torch.randint(0, 501, (9,))
    want_N = torch.nn.functional.cross_entropy(z_NV.double(), labels_N, reduction="none")
    torch.testing.assert_close(cross_entropy(z_NV, labels_N).double(), want_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 5.0), (0.5, 5.0)])
def test_tail_logits_equal_those_of_the_cache(scale, cap):
    random = np.random.default_rng(1)
    projection = Projection(
        mean_D=np.zeros(4, np.float32),
        down_RD=np.zeros((4, 4), np.float32),
        basis_VR=random.normal(size=(300, 4)).astype(np.float16),
        bias_V=random.normal(size=300).astype(np.float32),
        variance_R=np.ones(4, np.float32),
        widths=((4, 2), (2, 2)),
        logit_scale=scale,
        soft_cap=cap,
        explained=1.0,
    )
    coords_NR = random.normal(size=(11, 4)).astype(np.float32)
    model = TailModel.of(projection, device=torch.device("cpu"), dtype=torch.float32)
    got_NV = model.logits(torch.from_numpy(coords_NR)).numpy()
    np.testing.assert_allclose(got_NV, projection.tail_logits(coords_NR), rtol=1e-5, atol=1e-5)
