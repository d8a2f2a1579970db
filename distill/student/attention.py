"""Kept queries and keys of the teacher and a student's forward pass flow in, the attention loss flows out.

Fused attention never shows its maps. The teacher's are rebuilt from what the cache holds (``distill.cache.attention``),
the student's from queries and keys that are kept on their way from an attention module to the function that attends.
Before anything is trained, a few tokens prove that these are the maps that the student has.

``B`` sequences, ``S`` padded length, ``N`` trained tokens, ``L`` positions of a sequence, ``H`` query heads, ``G`` key
heads, ``d`` head dimension.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
_KEEPING = "distill_keeping"  # what ``_keeping`` is called among transformers' attention functions
_PROBE_TOKENS, _PROBE_WINDOW = 12, 4
_PROBE_TV = 1e-3  # most that a rebuilt map may differ from the model's own, in total variation
_PROBE_ERRORS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError)


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
    """What a student's layer attended with in its latest forward pass; ``G`` divides ``H``."""

    q_BHSd: Tensor
    k_BGSd: Tensor
    scale: float
    soft_cap: float | None
    window: int | None

    def of(self, row: int, columns: slice) -> tuple[Tensor, Tensor]:
        """Queries and keys of a sequence, keys repeated for each query head: [L, H, d] each."""
        q_HLd, k_GLd = self.q_BHSd[row, :, columns], self.k_BGSd[row, :, columns]
        return q_HLd.transpose(0, 1), k_GLd.repeat_interleave(len(q_HLd) // len(k_GLd), 0).transpose(0, 1)


class AttentionLoss:
    """``Σ_n A_n`` over trained tokens: the mean over layer pairs of ``attention_distance``; see ``docs/losses.md``.

    ``decoder`` is the student's without its head. Making one puts hooks on it and its attention modules, which from
    then on leave their queries and keys here (no longer in one that was made before) in every forward pass, and runs it
    once on a few tokens. Where its weights are spread over ranks, all must make theirs together. Raises UsageError for
    layers and heads that are not there, and for a layer whose rebuilt maps are not the student's own.
    """

    def __init__(
        self, decoder: nn.Module, config: Any, specs: dict[int, AttentionSpec], settings: AttentionConfig, *, depth: int
    ) -> None:
        num_layers = int(config.num_hidden_layers)
        self._measure = settings.measure
        self._specs = specs
        self._pairs = layer_pairs(settings, specs, teacher_layers=depth, student_layers=num_layers)
        self._seen: dict[int, _Seen] = {}
        self._maps: dict[int, Tensor] | None = None  # the model's own, [B, H, S, S], in a probe alone
        self._keeps = False  # recomputing a layer in the backward pass attends once more
        decoder.register_forward_pre_hook(lambda *_: self._keep(True))
        decoder.register_forward_hook(lambda *_: self._keep(False))
        found = find_layers(decoder, num_layers)
        for layer in sorted({pair.student for pair in self._pairs}):
            module = None if found is None else getattr(getattr(*found)[layer], "self_attn", None)
            _check_module(module, decoder)
            assert module is not None
            for pair in self._pairs:
                _check_heads(pair, layer, int(config.num_attention_heads))
            self._tap(module, layer)
        self._prove(decoder, config)

    def __call__(self, sequences: Sequence[SequenceHeads]) -> Tensor:
        """The sum over the trained tokens of the latest forward pass's sequences."""
        parts = [self._of_pair(sequence, pair) for sequence in sequences for pair in self._pairs]
        self._seen.clear()
        return torch.stack(parts).sum() / len(self._pairs)

    def _of_pair(self, sequence: SequenceHeads, pair: LayerPair) -> Tensor:
        seen, kept = self._seen[pair.student], sequence.layers[pair.teacher]
        teacher_q_NHd, teacher_k_LHd = self._teacher(sequence, pair.teacher, seen.q_BHSd.device)
        num = len(kept.k)
        q_LHd, k_LHd = seen.of(sequence.row, slice(sequence.start, sequence.start + num))
        heads = max(q_LHd.shape[1], teacher_q_NHd.shape[1])
        rows = max(1, _MAP_VALUES // (heads * num))
        spec, positions_N = self._specs[pair.teacher], sequence.positions.to(q_LHd.device)
        # What the student cannot see, it cannot learn to look at: the divergence would be infinite.
        shared = min((window for window in (spec.window, seen.window) if window is not None), default=None)

        def distance(teacher_q: Tensor, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
            theirs = log_map(
                teacher_q,
                teacher_k_LHd,
                positions,
                scale=spec.softmax_scale,
                soft_cap=spec.soft_cap,
                window=shared,
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

    def _keep(self, on: bool) -> None:
        self._keeps = on
        if on:
            self._seen.clear()

    def _tap(self, module: Any, layer: int) -> None:
        """Let ``module`` find ``_keeping`` where it looks for the function that attends, once for each forward pass."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(_KEEPING, _keeping)
        own = module.config
        tapped = copy.deepcopy(own)
        tapped._attn_implementation, tapped.distill_untapped, tapped.distill_keep = _KEEPING, own, self._keeper(layer)

        def tap(module: Any, _arguments: Any) -> None:
            if self._keeps:
                module.config = tapped

        module.register_forward_pre_hook(tap)

    def _keeper(self, layer: int) -> Any:
        def keep(
            module: Any, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, *rest: Any, **options: Any
        ) -> tuple[Tensor, Any]:
            scale = options.get("scaling")
            self._seen[layer] = _Seen(
                q_BHSd=q_BHSd,
                k_BGSd=k_BGSd,
                scale=q_BHSd.shape[-1] ** -0.5 if scale is None else float(scale),
                soft_cap=options.get("softcap"),
                window=options.get("sliding_window"),
            )
            attend = _function_of(module)
            if self._maps is None:
                output, attended = attend(module, q_BHSd, k_BGSd, v_BGSd, *rest, **options)
                return output, attended
            wide = torch.promote_types(q_BHSd.dtype, torch.float32)  # what bf16 rounds off is no mistake
            inputs = (q_BHSd.to(wide), k_BGSd.to(wide), v_BGSd.to(wide))
            output, self._maps[layer] = attend(module, *inputs, *rest, **options)
            return output.to(v_BGSd.dtype), None

        return keep

    @torch.no_grad()
    def _prove(self, decoder: nn.Module, config: Any) -> None:
        """Raise UsageError unless the maps of a few tokens come out as the model's own, in every layer that is used."""
        layers = sorted({pair.student for pair in self._pairs})
        ids_S = torch.arange(_PROBE_TOKENS, device=next(decoder.parameters()).device) % int(config.vocab_size)
        self._maps = {}
        try:
            window = getattr(config, "sliding_window", None)
            with _probed(decoder):
                decoder(input_ids=ids_S.unsqueeze(0), use_cache=False)
            off = {layer: self._total_variation(layer, window) for layer in layers}
        except _PROBE_ERRORS as error:
            raise _refusal(decoder, layers, f"{type(error).__name__} when a few tokens were tried: {error}") from error
        finally:
            self._maps = None
            self._seen.clear()
        wrong = [layer for layer in layers if not off[layer] <= _PROBE_TV]
        if wrong:
            figures = " and ".join(f"{off[layer]:.2g}" for layer in wrong)
            raise _refusal(decoder, wrong, f"on a few tokens they come out wrong by {figures} in total variation")

    def _total_variation(self, layer: int, window: int | None) -> float:
        """Of a probe's map that is rebuilt, the largest over heads and positions.

        ``window`` is the configuration's, which the probe shortened.
        """
        assert self._maps is not None
        seen, own_HSS = self._seen[layer], self._maps[layer][0]
        q_LHd, k_LHd = seen.of(0, slice(None))
        ours_HSS = log_map(
            q_LHd,
            k_LHd,
            torch.arange(len(q_LHd), device=q_LHd.device),
            scale=seen.scale,
            soft_cap=seen.soft_cap,
            window=_PROBE_WINDOW if seen.window is not None and seen.window == window else seen.window,
        ).exp()
        return float((ours_HSS - own_HSS).abs().sum(2).max() / 2)


def _keeping(module: Any, *inputs: Any, **options: Any) -> tuple[Tensor, Any]:
    """What transformers calls as the attention function of a tapped module."""
    keep, module.config = module.config.distill_keep, module.config.distill_untapped
    output, attended = keep(module, *inputs, **options)
    return output, attended


def _function_of(module: Any) -> Any:
    """The function that attends for ``module``, as transformers finds it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get(module.config._attn_implementation, eager)


@contextmanager
def _probed(decoder: nn.Module) -> Iterator[None]:
    """In evaluation mode, on attention that shows its maps, with windows so short that a few tokens meet their end."""
    configs = {id(module.config): module.config for module in decoder.modules() if hasattr(module, "config")}
    changed: list[tuple[Any, str, Any]] = []
    was_training = decoder.training
    try:
        for config in configs.values():
            for name in ("_attn_implementation", "sliding_window", "attention_chunk_size"):
                if getattr(config, name, None) is not None:
                    changed.append((config, name, getattr(config, name)))
        for config, name, _ in changed:
            setattr(config, name, "eager" if name == "_attn_implementation" else _PROBE_WINDOW)
        decoder.eval()
        yield
    finally:
        decoder.train(was_training)
        for config, name, value in changed:
            setattr(config, name, value)


def _refusal(decoder: nn.Module, layers: Sequence[int], why: str) -> UsageError:
    return UsageError(
        f"the attention maps of layer {' and '.join(map(str, layers))} of {type(decoder).__name__} cannot be rebuilt "
        f"from its queries and keys: {why}. The attention loss would train maps that the student does not have. Pair "
        "other layers of the student in attention.layers, or leave weights.attention at 0."
    )


def _check_module(module: Any, decoder: nn.Module) -> None:
    if not hasattr(module, "config") or not hasattr(sys.modules[type(module).__module__], "eager_attention_forward"):
        raise UsageError(
            f"the attention of {type(decoder).__name__} is none whose maps distill can rebuild (it looks for a "
            "self_attn that attends by a function of transformers). Set weights.attention to 0, or use another student."
        )


def _check_heads(pair: LayerPair, layer: int, num_heads: int) -> None:
    wrong = [head for _, head in pair.heads if not 0 <= head < num_heads]
    if pair.student == layer and wrong:
        raise UsageError(
            f"attention.heads names head {wrong[0]} of the student, which has heads 0 to {num_heads - 1} in a layer. "
            "Correct the number, or leave attention.heads empty for means over heads."
        )
