"""Final hidden states and an LM head flow in, weighted KL and cross-entropy summed over tokens flow out.

Logits exist only for ``chunk`` tokens at a time, the student's and the rebuilt teacher's alike, and their gradient is
used up within the chunk: memory is O(chunk V), not O(N V).

``N`` trained tokens, ``D`` the student's hidden size, ``V`` real vocabulary, ``H`` rows of the head (H >= V, since
models pad it), ``R`` rank of the cache's projection.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.student.losses.ce import cross_entropy
from distill.student.losses.divergence import FORWARD, Divergence
from distill.student.losses.kl import TeacherTargets, wide
from distill.student.losses.onepass import ChunkTargets, losses_with_gradient
from distill.student.losses.sampled import SampledTargets, sampled_kl
from distill.student.losses.tail import TailModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A student's LM head. Logits are ``scale cap(W h + bias)`` over the first ``vocab_size`` rows of W."""

    weight: Tensor  # [H, D]
    bias: Tensor | None  # [H]
    vocab_size: int
    scale: float
    soft_cap: float | None
    compute_dtype: torch.dtype  # of the matrix products

    def matrix(self) -> Tensor:
        """The rows of W that belong to real ids, in the dtype of the products: [V, D], cut off from any graph."""
        return self.weight[: self.vocab_size].detach().to(self.compute_dtype)

    def product(self, hidden_ND: Tensor, matrix_VD: Tensor) -> Tensor:
        """``W h + bias`` with W from ``matrix``, cut off from any graph: [N, V], float32 where there is a bias."""
        raw_NV = hidden_ND.detach().to(self.compute_dtype) @ matrix_VD.T
        return raw_NV if self.bias is None else wide(raw_NV) + self.bias[: self.vocab_size].detach()

    @property
    def is_plain(self) -> bool:
        """Whether logits are ``W h + bias`` itself."""
        return self.soft_cap is None and self.scale == 1.0

    def finish(self, raw_NV: Tensor) -> Tensor:
        """Cap and scale ``W h + bias`` as the student's own forward pass does."""
        if self.soft_cap is not None:
            raw_NV = self.soft_cap * torch.tanh(raw_NV / self.soft_cap)
        return raw_NV * self.scale if self.scale != 1.0 else raw_NV

    def unfinish(self, grad_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """The gradient with respect to ``W h + bias``, given that with respect to the finished logits."""
        grad_NV = grad_NV * self.scale if self.scale != 1.0 else grad_NV
        if self.soft_cap is None:
            return grad_NV
        return grad_NV * (1 - (logits_NV / (self.scale * self.soft_cap)).square())


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTargets:
    """What KL and cross-entropy compare N tokens with, and how. The tail is low-rank where ``tail`` is given.

    Against ``SampledTargets`` there is only the forward divergence, and no tail.
    """

    teacher: TeacherTargets | SampledTargets
    labels: Tensor  # [N] int64
    coords: Tensor | None  # [N, R]
    tail: TailModel | None
    divergence: Divergence = FORWARD


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLosses:
    """Sums over tokens. ``weighted`` carries the gradient; ``kl`` is the divergence asked for and includes T²."""

    weighted: Tensor
    kl: Tensor
    ce: Tensor


def fused_head_losses(
    hidden_ND: Tensor, head: Head, targets: HeadTargets, *, kl_weight: float, ce_weight: float, chunk: int
) -> HeadLosses:
    """``Σ_n (kl_weight T² KL_n + ce_weight CE_n)``, differentiable in hidden states and head.

    A loss of weight 0 is not computed and reported as 0; one of the weights must be above 0. The two terms are
    ``targets.divergence`` (KL by default) and ``cross_entropy``.
    """
    assert kl_weight > 0 or ce_weight > 0, "nothing to compute"
    work = _Work(
        head=head,
        targets=targets,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        chunk=chunk,
        with_gradient=torch.is_grad_enabled(),  # inside forward() it is always off
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        weighted, kl, ce = _FusedHead.apply(hidden_ND, head.weight, head.bias, work)  # type: ignore[no-untyped-call]
    return HeadLosses(weighted=weighted, kl=kl, ce=ce)


def chunks_of_logits(
    hidden_ND: Tensor, head: Head, matrix_VD: Tensor, *, chunk: int
) -> Iterator[tuple[int, int, Tensor]]:
    """``(start, stop, W h + bias)`` for ``chunk`` tokens at a time, the last [<= chunk, V], float32 or wider.

    ``matrix_VD`` is ``head.matrix()``. The tensors are cut off from any graph.
    """
    for start in range(0, len(hidden_ND), chunk):
        stop = min(start + chunk, len(hidden_ND))
        yield start, stop, wide(head.product(hidden_ND[start:stop], matrix_VD))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    head: Head
    targets: HeadTargets
    kl_weight: float
    ce_weight: float
    chunk: int
    with_gradient: bool

    def losses(self, raw_NV: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """KL sum and cross-entropy sum of one chunk."""
        logits_NV = self.head.finish(wide(raw_NV))
        kl, ce = logits_NV.new_zeros(()), logits_NV.new_zeros(())
        if self.kl_weight > 0:
            kl = self._divergence(logits_NV, start, stop).sum()
        if self.ce_weight > 0:
            ce = cross_entropy(logits_NV, self.targets.labels[start:stop]).sum()
        return kl, ce

    def _divergence(self, logits_NV: Tensor, start: int, stop: int) -> Tensor:
        teacher = self.targets.teacher.rows(start, stop)
        if isinstance(teacher, SampledTargets):
            return sampled_kl(logits_NV, teacher)
        return self.targets.divergence(logits_NV, teacher, self.tail_logits(start, stop))

    def gradient(self, raw_NV: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of one chunk's weighted sum with respect to ``raw_NV``, its KL sum and cross-entropy sum."""
        if self.kl_weight == 0 or self.targets.divergence.name == "forward":
            return self._gradient_by_hand(raw_NV, start, stop)
        leaf_NV = wide(raw_NV).requires_grad_()
        with torch.enable_grad():
            kl, ce = self.losses(leaf_NV, start, stop)
            grad_NV = torch.autograd.grad(self.kl_weight * kl + self.ce_weight * ce, leaf_NV)[0]
        return grad_NV, kl.detach(), ce.detach()

    def _gradient_by_hand(self, raw_NV: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        targets, head, tail_NV, bias_V = self.targets, self.head, None, None
        if targets.tail is not None and targets.coords is not None and self.kl_weight > 0:
            tail_NV, bias_V = targets.tail.with_bias_apart(targets.coords[start:stop])
        logits_NV = raw_NV if head.is_plain else head.finish(wide(raw_NV))
        chunk = ChunkTargets(
            teacher=targets.teacher.rows(start, stop),
            labels=targets.labels[start:stop],
            tail_logits=tail_NV,
            tail_bias=bias_V,
            kl_weight=self.kl_weight,
            ce_weight=self.ce_weight,
        )
        dtype = head.compute_dtype if head.is_plain else logits_NV.dtype
        found = losses_with_gradient(logits_NV, chunk, dtype=dtype)
        grad_NV = found.gradient if head.is_plain else head.unfinish(found.gradient, logits_NV)
        return grad_NV, found.kl, found.ce

    def tail_logits(self, start: int, stop: int) -> Tensor | None:
        if self.targets.tail is None or self.targets.coords is None:
            return None
        return self.targets.tail.logits(self.targets.coords[start:stop])


class _Gradients:
    """Gradients of the weighted sum, filled in chunk by chunk in float32; only those that something asks for."""

    def __init__(self, head: Head, matrix_VD: Tensor, *, hidden_ND: Tensor, needs: tuple[bool, ...]) -> None:
        self.compute_dtype = head.compute_dtype
        self.matrix_VD = matrix_VD
        dtype = torch.float64 if head.compute_dtype == torch.float64 else torch.float32
        self.hidden_ND = torch.zeros_like(hidden_ND, dtype=dtype) if needs[0] else None
        self.weight_HD = torch.zeros_like(head.weight, dtype=dtype) if needs[1] else None
        self.bias_H = torch.zeros_like(head.bias, dtype=dtype) if head.bias is not None and needs[2] else None

    def add(self, grad_NV: Tensor, hidden_ND: Tensor, start: int) -> None:
        num_tokens, num_vocab = grad_NV.shape
        narrow_NV = grad_NV.to(self.compute_dtype)
        if self.hidden_ND is not None:
            self.hidden_ND[start : start + num_tokens] = narrow_NV @ self.matrix_VD
        if self.weight_HD is not None and self.weight_HD.dtype == self.compute_dtype:
            self.weight_HD[:num_vocab].addmm_(narrow_NV.T, hidden_ND.to(self.compute_dtype))
        elif self.weight_HD is not None:
            self.weight_HD[:num_vocab] += narrow_NV.T @ hidden_ND.to(self.compute_dtype)
        if self.bias_H is not None:
            self.bias_H[:num_vocab] += grad_NV.sum(0, dtype=self.bias_H.dtype)


class _FusedHead(torch.autograd.Function):
    """Computes each chunk's gradient while its logits exist; the backward pass only scales it."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_HD: Tensor, bias_H: Tensor | None, work: _Work
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = tuple(wanted and work.with_gradient for wanted in ctx.needs_input_grad[:3])
        matrix_VD = work.head.matrix()
        gradients = _Gradients(work.head, matrix_VD, hidden_ND=hidden_ND, needs=needs)
        sums_3 = torch.zeros(3, dtype=wide(hidden_ND[:0]).dtype, device=hidden_ND.device)
        for start in range(0, len(hidden_ND), work.chunk):
            stop = min(start + work.chunk, len(hidden_ND))
            raw_NV = work.head.product(hidden_ND[start:stop], matrix_VD)
            if any(needs):
                grad_NV, kl, ce = work.gradient(raw_NV, start, stop)
                gradients.add(grad_NV, hidden_ND[start:stop], start)
            else:
                kl, ce = work.losses(raw_NV, start, stop)
            sums_3 += torch.stack([work.kl_weight * kl + work.ce_weight * ce, kl, ce])
        ctx.save_for_backward(gradients.hidden_ND, gradients.weight_HD, gradients.bias_H)
        ctx.dtypes = (hidden_ND.dtype, weight_HD.dtype, None if bias_H is None else bias_H.dtype)
        weighted, kl, ce = sums_3.unbind()
        weighted = weighted.clone()
        ctx.mark_non_differentiable(kl, ce)
        return weighted, kl, ce

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight, bias = (
            None if gradient is None else (gradient * grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return hidden, weight, bias, None
