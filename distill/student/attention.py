"""Kept queries and keys of the teacher and a student's forward pass flow in, the attention loss flows out.

Fused attention never shows its maps. The teacher's are rebuilt from what the cache holds (``distill.cache.attention``),
the student's from queries and keys that its attention modules are asked for once more while they run.

``B`` sequences, ``S`` padded length, ``N`` trained tokens, ``L`` positions of a sequence, ``H`` query heads, ``G`` key
heads, ``d`` head dimension.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.cache.attention import AttentionSpec
from distill.config import AttentionConfig
from distill.errors import UsageError
from distill.student.losses.attention import attention_distance, log_map, mean_map, turned
from distill.student.shrink import find_layers, same_depth

_MAP_VALUES = 2**23  # of maps [H, N, L] that exist at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptHeads:
    """What a cache keeps of one layer's heads for one sequence, cut like it: queries where a token is trained."""

    q: NDArray[np.int8]  # [n, H d]
    q_scale: NDArray[np.float32]  # [n, H]
    k: NDArray[np.int8]  # [L, G d]
    k_scale: NDArray[np.float32]  # [L, G]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceHeads:
    """The kept heads of a sequence of a batch, and where it lies in it."""

    row: int
    start: int  # first column
    positions: Tensor  # [n] int64, of its trained tokens, from 0
    layers: dict[int, KeptHeads]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPair:
    """A teacher's layer and the student's that learns from it; ``heads`` are pairs of a kept head's place and a head.

    Without ``heads`` the mean over the kept heads stands against the mean over all of the student's.
    """

    teacher: int
    student: int
    heads: tuple[tuple[int, int], ...]


def layer_pairs(
    config: AttentionConfig, specs: dict[int, AttentionSpec], *, teacher_layers: int, student_layers: int
) -> list[LayerPair]:
    """One pair for each kept layer, or for those that the configuration names; by default at the same relative depth.

    Raises UsageError when it names layers or heads that are not there.
    """
    asked = config.layers or {
        layer: same_depth(layer, teacher_layers=teacher_layers, student_layers=student_layers) for layer in specs
    }
    for teacher, student in asked.items():
        if teacher not in specs:
            raise UsageError(
                f"attention.layers names layer {teacher} of the teacher, but the cache keeps heads of "
                f"{', '.join(map(str, specs)) or 'none'}. Name one of these, or make a cache with targets.heads."
            )
        if not 0 <= student < student_layers:
            raise UsageError(
                f"attention.layers pairs layer {teacher} of the teacher with layer {student} of the student, which has "
                f"layers 0 to {student_layers - 1}. Correct the number."
            )
    pairs = []
    for teacher, student in asked.items():
        kept = specs[teacher].heads
        missing = [head for head in config.heads if head not in kept]
        if missing:
            raise UsageError(
                f"attention.heads names head {missing[0]} of the teacher, but of layer {teacher} the cache keeps heads "
                f"{', '.join(map(str, kept))}. Name these, or leave attention.heads empty for means over heads."
            )
        heads = tuple((kept.index(ours), theirs) for ours, theirs in config.heads.items())
        pairs.append(LayerPair(teacher=teacher, student=student, heads=heads))
    return pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A student's layer in its latest forward pass, after the rotary embedding."""

    q_BSHd: Tensor
    k_BSHd: Tensor  # keys repeated for each query head
    scale: float
    soft_cap: float | None
    window: int | None


class AttentionLoss:
    """``Σ_n A_n`` over trained tokens: the mean over layer pairs of ``attention_distance``; see ``docs/losses.md``.

    ``decoder`` is the student's without its head. Making one puts hooks on its attention modules, which from then on
    leave their queries and keys here in every forward pass.
    """

    def __init__(
        self, decoder: nn.Module, config: Any, specs: dict[int, AttentionSpec], settings: AttentionConfig, *, depth: int
    ) -> None:
        num_layers = int(config.num_hidden_layers)
        self._measure = settings.measure
        self._specs = specs
        self._pairs = layer_pairs(settings, specs, teacher_layers=depth, student_layers=num_layers)
        self._seen: dict[int, _Seen] = {}
        found = find_layers(decoder, num_layers)
        for layer in sorted({pair.student for pair in self._pairs}):
            module = None if found is None else getattr(getattr(*found)[layer], "self_attn", None)
            _check_module(module, decoder)
            assert module is not None
            for pair in self._pairs:
                _check_heads(pair, layer, int(config.num_attention_heads))
            module.register_forward_hook(self._keeper(layer), with_kwargs=True)

    def __call__(self, sequences: Sequence[SequenceHeads]) -> Tensor:
        """The sum over the trained tokens of the latest forward pass's sequences."""
        parts = [self._of_pair(sequence, pair) for sequence in sequences for pair in self._pairs]
        self._seen.clear()
        return torch.stack(parts).sum() / len(self._pairs)

    def _of_pair(self, sequence: SequenceHeads, pair: LayerPair) -> Tensor:
        seen, kept = self._seen[pair.student], sequence.layers[pair.teacher]
        teacher_q_NHd, teacher_k_LHd = self._teacher(sequence, pair.teacher, seen.q_BSHd.device)
        num = len(kept.k)
        k_LHd = seen.k_BSHd[sequence.row, sequence.start : sequence.start + num]
        q_LHd = seen.q_BSHd[sequence.row, sequence.start : sequence.start + num]
        heads = max(q_LHd.shape[1], teacher_q_NHd.shape[1])
        rows = max(1, _MAP_VALUES // (heads * num))
        spec, positions_N = self._specs[pair.teacher], sequence.positions.to(q_LHd.device)

        def distance(teacher_q: Tensor, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
            theirs = log_map(
                teacher_q,
                teacher_k_LHd,
                positions,
                scale=spec.softmax_scale,
                soft_cap=spec.soft_cap,
                window=spec.window,
            )
            ours = log_map(q, k, positions, scale=seen.scale, soft_cap=seen.soft_cap, window=seen.window)
            if pair.heads:
                theirs, ours = theirs[[place for place, _ in pair.heads]], ours[[head for _, head in pair.heads]]
            else:
                theirs, ours = mean_map(theirs), mean_map(ours)
            return attention_distance(theirs, ours, measure=self._measure).sum()

        total = q_LHd.new_zeros((), dtype=torch.float32)
        for part_N, teacher_q in zip(positions_N.split(rows), teacher_q_NHd.split(rows), strict=True):
            # Maps of a part are made again in the backward pass, so that only one part's exist at a time.
            total = total + checkpoint(distance, teacher_q, q_LHd[part_N], k_LHd, part_N, use_reentrant=False)
        return total

    def _teacher(self, sequence: SequenceHeads, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Queries of trained positions [N, H, d] and keys [L, H, d], as they enter the softmax."""
        spec, kept = self._specs[layer], sequence.layers[layer]

        def ready(values: NDArray[np.int8], scale: NDArray[np.float32], bias: Any, positions: Tensor) -> Tensor:
            scales = torch.from_numpy(scale).to(device)
            x_LHd = torch.from_numpy(values).to(device).unflatten(1, (scale.shape[1], -1)).float() * scales[..., None]
            if bias is not None:
                x_LHd = x_LHd + torch.from_numpy(bias).to(device)
            inv_freq = torch.from_numpy(spec.inv_freq).to(device)
            return turned(x_LHd, positions, inv_freq, factor=spec.rope_factor, interleaved=spec.interleaved)

        q_NHd = ready(kept.q, kept.q_scale, spec.q_bias, sequence.positions.to(device))
        k_LGd = ready(kept.k, kept.k_scale, spec.k_bias, torch.arange(len(kept.k), device=device))
        return q_NHd, k_LGd[:, list(spec.group)]

    def _keeper(self, layer: int) -> Any:
        def keep(module: Any, arguments: tuple[Any, ...], options: dict[str, Any], _output: Any) -> None:
            hidden_BSD = arguments[0] if arguments else options["hidden_states"]
            cos, sin = options["position_embeddings"] if "position_embeddings" in options else arguments[1]
            q_BSHd = module.q_proj(hidden_BSD).unflatten(-1, (-1, module.head_dim))
            k_BSGd = module.k_proj(hidden_BSD).unflatten(-1, (-1, module.head_dim))
            if getattr(module, "q_norm", None) is not None:
                q_BSHd, k_BSGd = module.q_norm(q_BSHd), module.k_norm(k_BSGd)
            turn = sys.modules[type(module).__module__].apply_rotary_pos_emb
            q_BHSd, k_BGSd = turn(q_BSHd.transpose(1, 2), k_BSGd.transpose(1, 2), cos, sin)
            repeats = q_BHSd.shape[1] // k_BGSd.shape[1]
            self._seen[layer] = _Seen(
                q_BSHd=q_BHSd.transpose(1, 2),
                k_BSHd=k_BGSd.repeat_interleave(repeats, 1).transpose(1, 2),
                scale=float(module.scaling),
                soft_cap=getattr(module, "attn_logit_softcapping", None),
                window=getattr(module, "sliding_window", None),
            )

        return keep


def _check_module(module: Any, decoder: nn.Module) -> None:
    has = all(hasattr(module, name) for name in ("q_proj", "k_proj", "head_dim", "scaling"))
    if not has or not hasattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb"):
        raise UsageError(
            f"the attention of {type(decoder).__name__} is none whose maps distill can rebuild (it looks for q_proj, "
            "k_proj and a rotary embedding). Set weights.attention to 0, or use another student."
        )


def _check_heads(pair: LayerPair, layer: int, num_heads: int) -> None:
    wrong = [head for _, head in pair.heads if not 0 <= head < num_heads]
    if pair.student == layer and wrong:
        raise UsageError(
            f"attention.heads names head {wrong[0]} of the student, which has heads 0 to {num_heads - 1} in a layer. "
            "Correct the number, or leave attention.heads empty for means over heads."
        )
