"""Protects the fused head: value and gradient against dense float64, chunks, padding, dtypes, tied and capped heads."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.student.losses.fused import Head, HeadTargets, fused_head_losses
from distill.student.losses.kl import TeacherTargets
from distill.student.losses.tail import TailModel

WEIGHTS = (0.7, 0.3)


def run(problem, *, chunk=16, kl_weight=WEIGHTS[0], ce_weight=WEIGHTS[1], head=None):
    """Losses and the gradients of hidden states and head, for leaves made of the problem's tensors."""
    hidden_ND = problem.hidden.detach().requires_grad_()
    head = head or problem.head
    head = dataclasses.replace(head, weight=head.weight.detach().requires_grad_())
    losses = fused_head_losses(hidden_ND, head, problem.targets, kl_weight=kl_weight, ce_weight=ce_weight, chunk=chunk)
    losses.weighted.backward()
    return losses, hidden_ND.grad, head.weight.grad


def dense(problem, dense_kl, *, dtype=torch.float64, kl_weight=WEIGHTS[0], ce_weight=WEIGHTS[1]):
    """The same by the book: logits in ``dtype`` as [N, V], the rest in float64."""
    hidden_ND, weight_HD, logits_NV = problem.logits(dtype)
    kl = dense_kl(problem, logits_NV.double()).sum()
    ce = torch.nn.functional.cross_entropy(logits_NV.double(), problem.targets.labels, reduction="sum")
    weighted = kl_weight * kl + ce_weight * ce
    weighted.backward()
    return weighted.detach(), hidden_ND.grad, weight_HD.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_value_and_gradients_equal_the_dense_reference(make_problem, dense_kl, tail, temperature):
    problem = make_problem(tail=tail, temperature=temperature)
    losses, hidden_grad, weight_grad = run(problem)
    weighted, want_hidden, want_weight = dense(problem, dense_kl)
    torch.testing.assert_close(losses.weighted.double(), weighted, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.weighted, WEIGHTS[0] * losses.kl + WEIGHTS[1] * losses.ce)
    torch.testing.assert_close(hidden_grad.double(), want_hidden, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weight_grad.double(), want_weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_costs_no_more_than_the_reference_in_it(make_problem, dense_kl, tail, dtype):
    problem = make_problem(tail=tail, temperature=2.0, dtype=dtype)
    truth = dense(problem, dense_kl)
    reference = dense(problem, dense_kl, dtype=dtype)
    losses, *gradients = run(problem)
    assert abs(losses.weighted - truth[0]) < 1.5 * abs(reference[0] - truth[0]) + 1e-3 * truth[0]
    for got, naive, exact in zip(gradients, reference[1:], truth[1:], strict=True):
        assert got.dtype == dtype
        assert (got.double() - exact).norm() < 1.5 * (naive.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_size_changes_nothing(make_problem, tail, dtype):
    problem = make_problem(tail=tail, temperature=2.0, dtype=dtype)
    whole, *whole_gradients = run(problem, chunk=1000)
    rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (2e-2, 5e-3)
    for chunk in (1, 5, 37):
        losses, *gradients = run(problem, chunk=chunk)
        torch.testing.assert_close(losses.weighted, whole.weighted, rtol=1e-5, atol=1e-5)
        for got, want in zip(gradients, whole_gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def test_one_loss_alone_is_computed_alone(make_problem, dense_kl, tail):
    problem = make_problem(tail=tail, temperature=2.0)
    for kl_weight, ce_weight in ((1.0, 0.0), (0.0, 1.0)):
        losses, hidden_grad, _ = run(problem, kl_weight=kl_weight, ce_weight=ce_weight)
        weighted, want_hidden, _ = dense(problem, dense_kl, kl_weight=kl_weight, ce_weight=ce_weight)
        torch.testing.assert_close(losses.weighted.double(), weighted, rtol=1e-5, atol=0)
        torch.testing.assert_close(hidden_grad.double(), want_hidden, rtol=1e-3, atol=1e-5)
        assert (losses.kl == 0) == (kl_weight == 0)
        assert (losses.ce == 0) == (ce_weight == 0)


def test_padded_rows_of_the_head_neither_count_nor_learn(make_problem):
    problem = make_problem(tail="bucket", temperature=1.0)
    loud_HD = problem.head.weight.clone()
    loud_HD[problem.head.vocab_size :] = 1e4
    losses, hidden_grad, _ = run(problem)
    with_loud, loud_hidden_grad, loud_weight_grad = run(problem, head=dataclasses.replace(problem.head, weight=loud_HD))
    torch.testing.assert_close(with_loud.weighted, losses.weighted)
    torch.testing.assert_close(loud_hidden_grad, hidden_grad)
    assert (loud_weight_grad[problem.head.vocab_size :] == 0).all()


def test_a_frozen_head_gets_no_gradient_and_no_graph_without_need(make_problem):
    problem = make_problem(tail="bucket", temperature=1.0, num_tokens=4)
    hidden_ND = problem.hidden.detach().requires_grad_()
    losses = fused_head_losses(hidden_ND, problem.head, problem.targets, kl_weight=1.0, ce_weight=0.0, chunk=2)
    losses.weighted.backward()
    assert problem.head.weight.grad is None
    with torch.no_grad():
        same = fused_head_losses(hidden_ND, problem.head, problem.targets, kl_weight=1.0, ce_weight=0.0, chunk=2)
    assert not same.weighted.requires_grad
    torch.testing.assert_close(same.weighted, losses.weighted.detach())
    assert not losses.kl.requires_grad


def test_a_tied_head_sums_both_gradients():
    """Embedding and head are one parameter: its gradient is that of the lookup plus that of the head."""
    torch.manual_seed(0)
    weight_HD = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    ids_N = torch.randint(0, 37, (6,))
    targets = tiny_targets(num_tokens=6, vocab=37)

    def loss(weight):
        hidden_ND = torch.tanh(torch.nn.functional.embedding(ids_N, weight))
        return hidden_ND, weight

    hidden_ND, weight = loss(weight_HD)
    head = tiny_head(weight, vocab=37)
    fused_head_losses(hidden_ND, head, targets, kl_weight=0.0, ce_weight=1.0, chunk=4).weighted.backward()
    got, weight_HD.grad = weight_HD.grad, None
    hidden_ND, weight = loss(weight_HD)
    torch.nn.functional.cross_entropy(hidden_ND @ weight[:37].T, targets.labels, reduction="sum").backward()
    torch.testing.assert_close(got, weight_HD.grad)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, 3.0)])
@pytest.mark.parametrize("with_tail", [True, False])
def test_gradcheck(scale, cap, with_tail):
    torch.manual_seed(0)
    hidden_ND = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight_HD = torch.randn(13, 4, dtype=torch.float64, requires_grad=True)
    bias_H = torch.randn(13, dtype=torch.float64, requires_grad=True)
    targets = tiny_targets(num_tokens=5, vocab=11, with_tail=with_tail)

    def loss(hidden, weight, bias):
        head = tiny_head(weight, vocab=11, bias=bias, scale=scale, cap=cap)
        return fused_head_losses(hidden, head, targets, kl_weight=0.6, ce_weight=0.4, chunk=2).weighted

    assert torch.autograd.gradcheck(loss, (hidden_ND, weight_HD, bias_H))


def tiny_head(weight_HD, *, vocab, bias=None, scale=1.0, cap=None):
    return Head(weight=weight_HD, bias=bias, vocab_size=vocab, scale=scale, soft_cap=cap, compute_dtype=weight_HD.dtype)


def tiny_targets(*, num_tokens, vocab, with_tail=False):
    generator = torch.Generator().manual_seed(1)
    log_p_NV = torch.randn(num_tokens, vocab, dtype=torch.float64, generator=generator).log_softmax(1)
    sorted_NV, ids_NV = log_p_NV.sort(descending=True)
    basis_VV, bias_V = torch.eye(vocab, dtype=torch.float64), torch.linspace(0, 1, vocab, dtype=torch.float64)
    tail = TailModel(basis=basis_VV, bias=bias_V, logit_scale=1.0, soft_cap=None)  # coordinates are the logits
    return HeadTargets(
        teacher=TeacherTargets(
            topk_ids=ids_NV[:, :3],
            topk_log_p=sorted_NV[:, :3],
            log_tail=sorted_NV[:, 3:].logsumexp(1),
            temperature=2.0,
        ),
        labels=torch.randint(0, vocab, (num_tokens,), generator=generator),
        coords=log_p_NV if with_tail else None,
        tail=tail if with_tail else None,
    )


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.num = max(self.num, value.numel())
        return result


def test_logits_of_all_tokens_never_exist(make_problem, tail):
    """Neither the student's nor the rebuilt teacher's, in neither direction: nothing is larger than one chunk."""
    problem = make_problem(tail=tail, temperature=2.0, num_tokens=64, student_size=4)
    with Largest() as largest:
        run(problem, chunk=8)
    assert largest.num == 8 * problem.head.vocab_size
    assert largest.num < 64 * problem.head.vocab_size
