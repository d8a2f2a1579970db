"""The teacher's configuration and the heads asked for flow in, what its attention does to them flows out.

Nothing here loads the teacher's weights: the structure comes from its configuration, the biases of the projections from
its checkpoint. A copy of each layer's attention, shrunk to two heads and drawn at random, then proves that its maps can
be rebuilt; an attention that works in some way of its own is refused before a cache is filled with it.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.cache.attention import AttentionSpec, rebuild_map
from distill.cache.plan import Heads
from distill.config import TargetsConfig
from distill.errors import UsageError

_PROBE_TOKENS = 12
_PROBE_TV = 1e-3  # most that a rebuilt map of the shrunken copy may differ from its own, in total variation
_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that change with the length of the sequence


def check_layers(model: Any, targets: TargetsConfig) -> None:
    """Raises UsageError when a layer or head does not exist. ``model`` is the language model's configuration."""
    num_layers, num_heads = int(model.num_hidden_layers), int(model.num_attention_heads)
    for layer in (*targets.layers, *targets.heads):
        if layer >= num_layers:
            raise UsageError(
                f"layer {layer} was asked for, but the teacher has layers 0 to {num_layers - 1}. The final hidden "
                "state is kept without being named; correct --layers or targets.heads."
            )
    for layer, heads in targets.heads.items():
        if max(heads) >= num_heads:
            raise UsageError(
                f"targets.heads names head {max(heads)} of layer {layer}, but the teacher has heads 0 to "
                f"{num_heads - 1} in a layer. Correct targets.heads."
            )
    if targets.layers and targets.layer_bytes > int(model.hidden_size):
        raise UsageError(
            f"targets.layer_bytes is {targets.layer_bytes}, but the teacher's states have {model.hidden_size} "
            f"dimensions, one byte each at most. Set targets.layer_bytes to {model.hidden_size} or less."
        )


def kept_heads(model: Any, targets: TargetsConfig) -> tuple[Heads, ...]:
    """The heads asked for, with the key heads that they attend with, in order of layer and head."""
    return tuple(
        Heads(
            layer=layer,
            heads=tuple(sorted(heads)),
            kv_heads=tuple(sorted({head // group_size(model) for head in heads})),
            head_dim=int(getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads),
        )
        for layer, heads in sorted(targets.heads.items())
    )


def attention_specs(
    folder: Path, model: Any, heads: Sequence[Heads], *, trust_remote_code: bool = False
) -> dict[int, AttentionSpec]:
    """What each layer of ``heads`` does to its queries and keys, by layer; ``folder`` is the teacher's.

    Raises UsageError when the maps of a layer cannot be rebuilt.
    """
    if not heads:
        return {}
    decoder = _skeleton(model, trust_remote_code=trust_remote_code)
    return {kept.layer: _proven(_spec(folder, decoder, kept), decoder, kept) for kept in heads}


def group_size(model: Any) -> int:
    """Query heads that attend with one key head."""
    num_heads = int(model.num_attention_heads)
    return num_heads // int(getattr(model, "num_key_value_heads", None) or num_heads)


def _skeleton(model: Any, *, trust_remote_code: bool) -> Any:
    """The teacher's decoder, its weights without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(model, trust_remote_code=trust_remote_code)
    decoder = whole.get_decoder()
    return decoder if hasattr(decoder, "layers") else decoder.model


def refusal(kept: Heads, why: str) -> UsageError:
    """The error of a layer whose queries and keys are not to be had, or of no use."""
    return UsageError(
        f"the attention of layer {kept.layer} cannot be rebuilt from queries and keys: {why}. Remove the layer from "
        "targets.heads; targets.layers and everything else work without it."
    )


def _spec(folder: Path, decoder: Any, kept: Heads) -> AttentionSpec:
    layer = decoder.layers[kept.layer]
    attention: Any = getattr(layer, "self_attn", None)
    projections = [name for name in ("qkv_proj", "q_proj", "k_proj") if hasattr(attention, name)]
    if not hasattr(layer, "input_layernorm") or projections not in (["qkv_proj"], ["q_proj", "k_proj"]):
        raise refusal(kept, f"{type(layer).__name__} does not norm its input and project it to queries and keys")
    biased = any(getattr(getattr(attention, name), "bias", None) is not None for name in projections)
    norm = getattr(attention, "q_norm", None)
    if norm is not None and any(weight.shape != (kept.head_dim,) for weight in norm.parameters()):
        raise refusal(kept, f"{type(attention).__name__} norms its heads together")
    if biased and norm is not None:
        raise refusal(kept, f"{type(attention).__name__} norms its queries and keys after a bias, which must stay in")
    if biased and projections == ["qkv_proj"]:
        raise refusal(kept, f"{type(attention).__name__} has one bias for queries, keys and values together")
    rotary = _Rotary.of(decoder, kept)
    group = group_size(decoder.config)
    return AttentionSpec(
        heads=kept.heads,
        kv_heads=kept.kv_heads,
        group=tuple(kept.kv_heads.index(head // group) for head in kept.heads),
        head_dim=kept.head_dim,
        q_bias=_bias(folder, kept, "q_proj.bias")[list(kept.heads)] if biased else None,
        k_bias=_bias(folder, kept, "k_proj.bias")[list(kept.kv_heads)] if biased else None,
        inv_freq=rotary.inv_freq,
        rope_factor=rotary.factor,
        interleaved=False,
        softmax_scale=float(attention.scaling),
        soft_cap=getattr(attention, "attn_logit_softcapping", None),
        window=_window(decoder.config, kept.layer),
    )


def _window(config: Any, layer: int) -> int | None:
    """Positions that the layer sees; transformers masks by it what lies further back."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    size = getattr(config, "sliding_window", None)
    return None if size is None else int(size)


def _bias(folder: Path, kept: Heads, name: str) -> NDArray[np.float32]:
    """A projection's bias from the teacher's checkpoint: [all heads, d] float32."""
    from safetensors import safe_open

    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [n for n in file.keys() if n.endswith(f"layers.{kept.layer}.self_attn.{name}")]  # noqa: SIM118
            found += [file.get_tensor(n).float().numpy() for n in names if "visi" not in n and "visual" not in n]
    if len(found) != 1:
        raise refusal(kept, f"its checkpoint has {len(found)} tensors that could be {name}")
    bias: NDArray[np.float32] = found[0].reshape(-1, kept.head_dim)
    return bias


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rotary:
    """A layer's rotary embedding: transformers' own module, made on the CPU."""

    module: Any
    kind: tuple[str, ...]  # arguments of the module that say which of its embeddings the layer takes
    inv_freq: NDArray[np.float32]
    factor: float

    @staticmethod
    def of(decoder: Any, kept: Heads) -> "_Rotary":
        if not hasattr(decoder, "rotary_emb"):
            raise refusal(kept, f"{type(decoder).__name__} has no rotary embedding")
        module = type(decoder.rotary_emb)(decoder.config)
        by_kind = "layer_type" in inspect.signature(module.forward).parameters
        kind = (str(decoder.config.layer_types[kept.layer]),) if by_kind else ()
        prefix = "".join(f"{name}_" for name in kind)
        rope_type = module.rope_type[kind[0]] if kind else getattr(module, "rope_type", "default")
        if rope_type in _BY_LENGTH:
            raise refusal(kept, f"its rotary embedding ({rope_type}) changes with the length of a sequence")
        return _Rotary(
            module=module,
            kind=kind,
            inv_freq=getattr(module, f"{prefix}inv_freq").float().numpy(),
            factor=float(getattr(module, f"{prefix}attention_scaling", 1.0)),
        )


def _proven(spec: AttentionSpec, decoder: Any, kept: Heads) -> AttentionSpec:
    """The spec, with the rotary embedding turned as the layer turns it: the one under which the copy's maps agree."""
    none = np.zeros(0, np.float32)
    variants = [spec, replace(spec, interleaved=True), replace(spec, inv_freq=none)]
    try:
        probe = _Probe.of(decoder, kept)
        errors = [probe.total_variation(variant) for variant in variants]
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise refusal(kept, f"{type(error).__name__} when a small copy of it was tried: {error}") from error
    if not min(errors) <= _PROBE_TV:
        raise refusal(kept, f"maps of a small copy of it come out wrong by {min(errors):.2g} in total variation")
    return variants[int(np.argmin(errors))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """What a shrunken copy of a layer's attention did: queries of two heads, keys of the one they share, maps."""

    queries: NDArray[np.float32]  # [L, 2, d]
    keys: NDArray[np.float32]  # [L, 1, d]
    q_bias: NDArray[np.float32] | None
    k_bias: NDArray[np.float32] | None
    maps: NDArray[np.float32]  # [2, L, L]

    def total_variation(self, spec: AttentionSpec) -> float:
        """Of the maps that ``spec`` rebuilds, the largest over all positions."""
        small = replace(
            spec, heads=(0, 1), kv_heads=(0,), group=(0, 0), q_bias=self.q_bias, k_bias=self.k_bias, window=None
        )
        return float(np.abs(rebuild_map(self.queries, self.keys, small) - self.maps).sum(axis=2).max() / 2)

    @staticmethod
    def of(decoder: Any, kept: Heads) -> "_Probe":
        import torch

        from distill.teacher.inner import queries_and_keys

        config = copy.deepcopy(decoder.config)
        config._attn_implementation = "eager"
        config.hidden_size, config.head_dim = 2 * kept.head_dim, kept.head_dim
        config.num_attention_heads, config.num_key_value_heads = 2, 1
        pair = Heads(layer=kept.layer, heads=(0, 1), kv_heads=(0,), head_dim=kept.head_dim)
        rotary = _Rotary.of(decoder, kept)
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(0)
            attention = type(decoder.layers[kept.layer].self_attn)(config, kept.layer).float().eval()
            for parameter in attention.parameters():
                spread = 2 / config.hidden_size**0.5
                parameter.normal_(*((0.0, spread) if parameter.ndim > 1 else (1.0, 0.3)))
            x_1LD = torch.randn(1, _PROBE_TOKENS, config.hidden_size)
            mask = torch.full((1, 1, _PROBE_TOKENS, _PROBE_TOKENS), torch.finfo(torch.float32).min).triu(1)
            places = rotary.module(x_1LD, torch.arange(_PROBE_TOKENS)[None], *rotary.kind)
            _, maps, *_ = attention(hidden_states=x_1LD, position_embeddings=places, attention_mask=mask)
            queries, keys = queries_and_keys(attention, x_1LD[0], pair)
            biases = [getattr(getattr(attention, name, None), "bias", None) for name in ("q_proj", "k_proj")]
            return _Probe(
                queries=queries.numpy(),
                keys=keys.numpy(),
                q_bias=None if biases[0] is None else biases[0].unflatten(0, (2, -1)).numpy(),
                k_bias=None if biases[1] is None else biases[1].unflatten(0, (1, -1)).numpy(),
                maps=maps[0].numpy(),
            )
