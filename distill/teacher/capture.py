"""Capture maths: final hidden states flow in, the statistics of the teacher's distribution flow out.

The LM head runs here, in chunks of positions, so that logits never exist for more than one chunk. Both engines use
this module. With tensor parallelism each rank holds a slice of the vocabulary, finds its own top-k and partial sums
(``LocalStatistics``), and ``merge`` joins the slices; a single slice is the same path with one part.

Shapes: N positions, D hidden size, V real vocabulary (this rank's slice of it in ``Head``), K top-k, T temperatures.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from distill.cache.projection import CLIPS, Projection
from distill.teacher import sampled
from distill.teacher.chunks import Chunks

# Stands for the logit of a candidate that is not there: its probability is 0, and 0 * z stays 0, unlike with -inf.
_OUT = -1e5
# A tail that underflows is stored as this, so that no infinity reaches a shard.
LOG_TAIL_FLOOR = -100.0
_BLOCK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to keep: k, and the temperatures in the order of the plan."""

    top_k: int
    temperatures: tuple[float, ...]
    num_samples: int = 0

    @property
    def computed(self) -> list[float]:
        """Temperatures downwards, and 1 whether it is kept or not: log-probabilities and entropy need it."""
        return sorted({*self.temperatures, 1.0}, reverse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What is kept of the teacher's distribution at N positions (see ``distill.records.Targets``)."""

    topk_ids: Tensor  # int32 [N, K]
    topk_logprobs: Tensor  # float32 [N, K]
    log_z: Tensor  # float32 [N, T]
    log_tail: Tensor  # float32 [N, T]
    entropy: Tensor  # float32 [N]
    drawn: Tensor  # int32 [N, S]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStatistics:
    """One vocabulary slice's share: its k largest logits, and sums over its other ids.

    ``log_rest[:, j]`` is ``log sum exp(z / T)`` at the j-th of ``Spec.computed`` over the slice's ids outside its
    own top-k, and ``mean_rest`` the expectation of z under ``exp(z)`` normalised over the same ids. Float32.
    """

    logits: Tensor  # [N, K], sorted downwards
    ids: Tensor  # int64 [N, K], ids of the whole vocabulary
    log_rest: Tensor  # [N, T]
    mean_rest: Tensor  # [N]
    drawn: Tensor  # int64 [N, S], drawn from the slice alone

    def packed(self) -> Tensor:
        """[N, 2K + T + 1 + S] float32, for one all-gather; ids travel as their bits."""
        ids, drawn = (values.to(torch.int32).view(torch.float32) for values in (self.ids, self.drawn))
        return torch.cat([self.logits, ids, self.log_rest, self.mean_rest[:, None], drawn], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor, spec: Spec) -> "LocalStatistics":
        """The inverse of ``packed``."""
        sizes = [spec.top_k, spec.top_k, len(spec.computed), 1, spec.num_samples]
        logits, ids, log_rest, mean_rest, drawn = packed.split(sizes, dim=1)
        ids, drawn = (values.contiguous().view(torch.int32).long() for values in (ids, drawn))
        return cls(logits=logits, ids=ids, log_rest=log_rest, mean_rest=mean_rest[:, 0], drawn=drawn)


class Head:
    """A slice of a teacher's LM head: ``logits = cap(W h + bias) * scale`` over the real vocabulary.

    ``weight`` is [rows, D] with at least ``num_ids`` rows; rows past ``num_ids`` are padding and never appear.
    ``float32`` computes the product in float32: on CUDA by the output type of the product, elsewhere by a float32
    copy of the weight. Otherwise it runs in the weight's own precision. ``compiled`` fuses the sums over the
    vocabulary into one pass (see ``can_compile``).
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        first_id: int = 0,
        num_ids: int,
        bias: Tensor | None = None,
        soft_cap: float | None = None,
        scale: float = 1.0,
        float32: bool = True,
        compiled: bool = False,
    ) -> None:
        if scale <= 0:
            raise ValueError(f"a logit scale must be positive, got {scale}")
        self.first_id = first_id
        self.num_ids = num_ids
        self.soft_cap = soft_cap
        self.scale = scale
        self.rest_sums = _compiled_rest_sums() if compiled else _rest_sums
        self._weight = weight[:num_ids]
        self._bias = None if bias is None else bias[:num_ids].float()
        self._float32 = float32 or weight.dtype == torch.float32
        self._copy: Tensor | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, num_ids], scaled and soft-capped: float32, or the weight's precision where nothing asks for more."""
        logits_NV = self._product(hidden_ND)
        if self._bias is not None:
            logits_NV = logits_NV + self._bias
        if self.soft_cap is not None:
            logits_NV = logits_NV.float().div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        if self.scale != 1.0:
            logits_NV = logits_NV.float().mul_(self.scale)
        return logits_NV

    def times(self, matrix_DR: Tensor) -> Tensor:
        """``W @ matrix`` in float32, [num_ids, R]: what the projection's basis is made of."""
        return torch.cat([rows.float() @ matrix_DR.float() for rows in self._weight.split(16384)])

    def gram(self) -> tuple[Tensor, Tensor]:
        """Float64 ``W' W`` [D, D] and the sum of W's rows [D], for the projection."""
        dim = self._weight.shape[1]
        gram_DD = torch.zeros(dim, dim, dtype=torch.float64, device=self._weight.device)
        sum_D = torch.zeros(dim, dtype=torch.float64, device=self._weight.device)
        for rows in self._weight.split(16384):
            gram_DD += (rows.float().T @ rows.float()).double()
            sum_D += rows.double().sum(0)
        return gram_DD, sum_D

    @property
    def bias(self) -> Tensor | None:
        """Float32 [num_ids], where the head has one."""
        return self._bias

    def _product(self, hidden_ND: Tensor) -> Tensor:
        weight = self._weight
        if not self._float32:
            return torch.mm(hidden_ND.to(weight.dtype), weight.T)
        if weight.dtype == torch.float32:
            return torch.mm(hidden_ND.float(), weight.T)
        if weight.is_cuda:
            return torch.mm(hidden_ND.to(weight.dtype), weight.T, out_dtype=torch.float32)
        if self._copy is None:
            self._copy = weight.float()
        return torch.mm(hidden_ND.float(), self._copy.T)


def local_statistics(
    head: Head, hidden_ND: Tensor, spec: Spec, *, keys_N: Tensor | None = None, rank: int = 0
) -> LocalStatistics:
    """The slice's top-k, partial sums and draws for N positions; logits exist only inside this call.

    ``keys_N`` (None: nothing is drawn) and the slice's ``rank`` decide the draws (``distill.teacher.sampled``). The
    N x V logits are written once by the head and, compiled, read twice: for the top-k and for all sums.
    """
    logits_NV = head.logits(hidden_ND)
    num = min(spec.top_k, head.num_ids)
    logits_NK, ids_NK = largest(logits_NV, num)
    logits_NK = logits_NK.float()
    top_N1 = logits_NK[:, :1]
    # One position alone would be compiled a second time: torch.compile treats a dimension of 1 as a constant.
    rest_sums = head.rest_sums if len(logits_NV) > 1 else _rest_sums
    sums_NT, mean_N = rest_sums(logits_NV, top_N1, logits_NK[:, -1:], num, spec.computed)
    log_rest_NT = sums_NT.log() + top_N1 / sums_NT.new_tensor(spec.computed)
    mean_rest_N = torch.where(mean_N.isfinite(), mean_N + top_N1[:, 0], 0.0)  # an empty rest has no mean
    drawn_NS = ids_NK[:, :0]
    if keys_N is not None and spec.num_samples:
        drawn_NS = sampled.draw(logits_NV, sampled.uniforms(keys_N, spec.num_samples, lane=1 + rank))
    if num < spec.top_k:  # a slice smaller than k: padded so that every rank packs the same shape
        short = spec.top_k - num
        logits_NK = torch.nn.functional.pad(logits_NK, (0, short), value=float("-inf"))
        ids_NK = torch.nn.functional.pad(ids_NK, (0, short))
    return LocalStatistics(
        logits=logits_NK,
        ids=ids_NK + head.first_id,
        log_rest=log_rest_NT,
        mean_rest=mean_rest_N,
        drawn=drawn_NS + head.first_id,
    )


def _rest_sums(
    logits_NV: Tensor, top_N1: Tensor, least_N1: Tensor, num: int, temperatures: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Sums over the ids outside the top-k: of ``exp(x / T)`` [N, T], and the mean of x under ``exp(x)`` [N].

    x is the logit less the row's largest, ``least`` the smallest logit of the top-k. The rest are the ids below it,
    and as many of the ids equal to it as the top-k did not take. ``temperatures`` run downwards and hold 1, so that
    ``exp(x / T)`` for T, T/2, T/4 … follows by squaring. One pass over the logits when compiled.
    """
    below_NV = logits_NV < least_N1
    x_NV, edge_N = logits_NV.float() - top_N1, (least_N1 - top_N1)[:, 0]
    num_tied_N = logits_NV.shape[1] - below_NV.float().sum(1) - num  # exact: a vocabulary is below 2**24
    sums: list[Tensor] = []
    y_NV, at, mean_N = x_NV, 0.0, edge_N
    for temperature in temperatures:
        if at == 2 * temperature:
            y_NV = y_NV * y_NV
        elif at == 4 * temperature:
            y_NV = (y_NV * y_NV) * (y_NV * y_NV)
        else:
            y_NV = torch.where(below_NV, torch.exp(x_NV * (1.0 / temperature)), 0.0)
        at = temperature
        sums.append(y_NV.sum(1) + num_tied_N * torch.exp(edge_N / temperature))
        if temperature == 1.0:
            mean_N = ((y_NV * x_NV).sum(1) + num_tied_N * torch.exp(edge_N) * edge_N) / sums[-1]
    return torch.stack(sums, dim=1), mean_N


@cache
def _compiled_rest_sums() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_rest_sums, dynamic=True)


def can_compile(device: torch.device) -> bool:
    """Whether the one-pass sums can be built here: a CPU needs a C++ compiler, on a GPU Triton brings its own."""
    return device.type == "cuda" or any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def largest(x_NV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Exact top-k of each row, sorted downwards: values [N, num] and int64 ids [N, num].

    On a CPU ``torch.topk`` costs more than the LM head itself. The num largest values of a row lie in the num
    blocks with the largest maxima, which are found in the same way, so only those blocks are looked at. A block is
    every ``stride``-th id, so that neighbours in memory are compared with their neighbours, many at a time.
    """
    num_rows, width = x_NV.shape
    if x_NV.is_cuda or width < 2 * num * _BLOCK:
        values, ids = torch.topk(x_NV, num, dim=1)
        return values, ids
    stride = width // _BLOCK
    whole = stride * _BLOCK
    _, first_NK = largest(x_NV[:, :whole].unflatten(1, (_BLOCK, stride)).amax(1), num)
    inside = torch.arange(0, whole, stride, device=x_NV.device)[:, None]
    ids_NC = (inside + first_NK[:, None, :]).flatten(1)
    if whole < width:
        ids_NC = torch.cat([ids_NC, torch.arange(whole, width, device=x_NV.device).expand(num_rows, -1)], dim=1)
    values, picked = x_NV.gather(1, ids_NC).topk(num, dim=1)
    return values, ids_NC.gather(1, picked)


def merge(parts: Sequence[LocalStatistics], spec: Spec, *, keys_N: Tensor | None = None) -> Statistics:
    """Joins the vocabulary slices: the global top-k, and every slice's rest plus its candidates that lost.

    ``log_z[T] = lse(z / T) - lse(z) / T`` and ``log_tail[T] = lse over the tail (z / T) - lse(z / T)``. The tail is
    summed by itself, never as one minus the head: at T=1 that difference is mostly rounding.
    """
    candidates_NC = torch.cat([part.logits for part in parts], dim=1)
    candidates_NC, order_NC = candidates_NC.sort(dim=1, descending=True, stable=True)
    ids_NC = torch.cat([part.ids for part in parts], dim=1).gather(1, order_NC)
    top_NK, lost_NC = candidates_NC[:, : spec.top_k], candidates_NC[:, spec.top_k :]

    temperature_T = top_NK.new_tensor(spec.computed)
    rest_NTP = torch.stack([part.log_rest for part in parts], dim=2)
    tail_NT = torch.cat([rest_NTP, lost_NC[:, None, :] / temperature_T[:, None]], dim=2).logsumexp(2)
    lse_NT = torch.logaddexp(tail_NT, (top_NK[:, None, :] / temperature_T[:, None]).logsumexp(2))

    one = spec.computed.index(1.0)
    lse_N1 = lse_NT[:, one, None]
    mean_rest_NP = torch.stack([part.mean_rest for part in parts], dim=1)
    expected_N = ((rest_NTP[:, one] - lse_N1).exp() * mean_rest_NP).sum(1)
    expected_N += ((candidates_NC - lse_N1).exp() * candidates_NC.clamp(min=_OUT)).sum(1)  # padding: 0, not NaN
    drawn_NS = parts[0].drawn
    if keys_N is not None and len(parts) > 1:
        mass_NP = torch.stack([torch.logaddexp(p.log_rest[:, one], p.logits.logsumexp(1)) for p in parts], dim=1)
        number_NS = sampled.uniforms(keys_N, spec.num_samples, lane=0)
        drawn_NS = sampled.choose(torch.stack([part.drawn for part in parts]), mass_NP, number_NS)
    kept = [spec.computed.index(temperature) for temperature in spec.temperatures]
    return Statistics(
        topk_ids=ids_NC[:, : spec.top_k].to(torch.int32),
        topk_logprobs=top_NK - lse_N1,
        log_z=(lse_NT - lse_N1 / temperature_T)[:, kept],
        log_tail=(tail_NT - lse_NT).clamp(min=LOG_TAIL_FLOOR)[:, kept],
        entropy=(lse_N1[:, 0] - expected_N).clamp(min=0.0),
        drawn=drawn_NS.to(torch.int32),
    )


def local_in_chunks(
    head: Head, hidden_ND: Tensor, spec: Spec, *, chunks: Chunks, keys_N: Tensor | None = None, rank: int = 0
) -> LocalStatistics:
    """``local_statistics`` of N positions, a chunk of them at a time."""

    def compute(start: int, stop: int) -> LocalStatistics:
        keys = None if keys_N is None else keys_N[start:stop]
        return local_statistics(head, hidden_ND[start:stop], spec, keys_N=keys, rank=rank)

    parts = chunks.map(compute, len(hidden_ND))
    names = [field.name for field in fields(LocalStatistics)]
    return LocalStatistics(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def statistics(
    head: Head, hidden_ND: Tensor, spec: Spec, *, chunks: Chunks, keys_N: Tensor | None = None
) -> Statistics:
    """Statistics of N positions under an unsliced head, a chunk of them at a time."""
    return merge([local_in_chunks(head, hidden_ND, spec, chunks=chunks, keys_N=keys_N)], spec)


class Projector:
    """The fitted projection on the engine's device: final hidden states in, quantised coordinates out."""

    def __init__(self, projection: Projection, device: torch.device) -> None:
        self._mean_D = torch.from_numpy(projection.mean_D).to(device)
        self._down_DR = torch.from_numpy(projection.down_RD).to(device).T.contiguous()
        self._widths = projection.widths

    def __call__(self, hidden_ND: Tensor) -> dict[int, Tensor]:
        """bits -> int8 [N, r_bits], by the quantiser of ``distill.cache.projection``."""
        coords_NR = (hidden_ND.float() - self._mean_D) @ self._down_DR
        quantised: dict[int, Tensor] = {}
        for (bits, _), part_NR in zip(
            self._widths, coords_NR.split([count for _, count in self._widths], dim=1), strict=True
        ):
            half = 1 << (bits - 1)
            levels_NR = (part_NR * (half / CLIPS[bits])).floor().clamp(-half, half - 1)
            quantised[bits] = levels_NR.to(torch.int8)
        return quantised
