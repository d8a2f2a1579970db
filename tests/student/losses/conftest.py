"""A random teacher at realistic sizes, its cached targets, and the dense float64 distributions that they stand for."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.cache.tail import rebuild
from distill.student.losses.fused import Head, HeadTargets
from distill.student.losses.kl import TeacherTargets
from distill.student.losses.tail import TailModel


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Student states and head (the head padded past V) against a teacher's cached targets at one temperature."""

    hidden: Tensor  # [N, D]
    head: Head
    targets: HeadTargets
    teacher_p: Tensor  # [N, V] float64, what the cached targets stand for
    tail: str

    def logits(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states and head as leaves in ``dtype``, and the plain dense logits over the real vocabulary."""
        hidden_ND = self.hidden.detach().to(dtype).requires_grad_()
        weight_HD = self.head.weight.detach().to(dtype).requires_grad_()
        return hidden_ND, weight_HD, hidden_ND @ weight_HD[: self.head.vocab_size].T


def _make_problem(
    *,
    tail: str,
    temperature: float,
    num_tokens: int = 37,
    vocab: int = 5003,
    padded: int = 5056,
    top_k: int = 64,
    rank: int = 48,
    student_size: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """A teacher whose logits are low-rank plus noise, so that the rebuilt tail is close to the truth, not equal."""
    random = np.random.default_rng(seed)
    basis_VR = random.normal(size=(vocab, rank)) * 3.0 * 0.93 ** np.arange(rank)
    bias_V = random.normal(size=vocab)
    coords_NR = random.normal(size=(num_tokens, rank)).astype(np.float32)
    logits_NV = coords_NR @ basis_VR.T + bias_V + 0.5 * random.normal(size=(num_tokens, vocab))
    logprobs_NV = logits_NV - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True)
    topk_ids_NK = np.argsort(-logprobs_NV, axis=1)[:, :top_k].astype(np.int32)
    topk_logprobs_NK = np.take_along_axis(logprobs_NV, topk_ids_NK, axis=1)
    log_z_N = np.logaddexp.reduce(logprobs_NV / temperature, axis=1)
    rest_NV = logprobs_NV / temperature - log_z_N[:, None]
    np.put_along_axis(rest_NV, topk_ids_NK, -np.inf, axis=1)
    log_tail_N = np.maximum(np.logaddexp.reduce(rest_NV, axis=1), -100.0)
    topk_logprobs_NK = np.round(topk_logprobs_NK * 512) / 512
    tail_model = TailModel(
        basis=torch.tensor(basis_VR.T, dtype=dtype),
        bias=torch.tensor(bias_V, dtype=torch.float32),
        logit_scale=1.0,
        soft_cap=None,
    )
    teacher = TeacherTargets(
        topk_ids=torch.from_numpy(topk_ids_NK).long(),
        topk_log_p=torch.tensor(topk_logprobs_NK / temperature - log_z_N[:, None], dtype=torch.float32),
        log_tail=torch.tensor(log_tail_N, dtype=torch.float32),
        temperature=temperature,
    )
    teacher_p_NV = rebuild(
        "low_rank",
        temperature=temperature,
        topk_ids_NK=topk_ids_NK,
        topk_logprobs_NK=topk_logprobs_NK,
        log_z_N=log_z_N,
        log_tail_N=log_tail_N,
        tail_logits_NV=coords_NR @ basis_VR.T + bias_V,
    )
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(num_tokens, student_size, generator=generator).to(dtype)
    weight_HD = (torch.randn(padded, student_size, generator=generator) * 0.4).to(dtype)
    return Problem(
        hidden=hidden_ND,
        head=Head(weight=weight_HD, bias=None, vocab_size=vocab, scale=1.0, soft_cap=None, compute_dtype=dtype),
        targets=HeadTargets(
            teacher=teacher,
            labels=torch.randint(0, vocab, (num_tokens,), generator=generator),
            coords=torch.from_numpy(coords_NR) if tail == "low_rank" else None,
            tail=tail_model if tail == "low_rank" else None,
        ),
        teacher_p=torch.from_numpy(teacher_p_NV),
        tail=tail,
    )


def _dense_kl(problem: Problem, logits_NV: Tensor) -> Tensor:
    """T² KL of each token by the book, [N]: every probability is formed; gradients by autograd."""
    teacher = problem.targets.teacher
    p_NV, q_NV = problem.teacher_p, (logits_NV / teacher.temperature).softmax(1)
    if problem.tail == "bucket":
        ids_NK = teacher.topk_ids
        uncached_NV = torch.ones_like(p_NV).scatter(1, ids_NK, 0.0)
        p_NV = torch.cat([p_NV.gather(1, ids_NK), (p_NV * uncached_NV).sum(1, keepdim=True)], 1)
        q_NV = torch.cat([q_NV.gather(1, ids_NK), (q_NV * uncached_NV).sum(1, keepdim=True)], 1)
    return teacher.temperature**2 * (p_NV * (p_NV.clamp(min=1e-300).log() - q_NV.log())).sum(1)


@pytest.fixture(params=["low_rank", "bucket"])
def tail(request: pytest.FixtureRequest) -> str:
    """Both ways to account for the tail."""
    return str(request.param)


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    """Builds a ``Problem``."""
    return _make_problem


@pytest.fixture
def dense_kl() -> Callable[[Problem, Tensor], Tensor]:
    """The float64 reference of the KL losses."""
    return _dense_kl
