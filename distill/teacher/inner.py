"""Inputs of inner layers flow in, the columns ``layer<i>_hidden``, ``layer<i>_q`` and ``layer<i>_k`` flow out.

What both engines share, and how the transformers engine gets at its layers. Queries and keys are computed again from
the layer's input, since fused attention never shows them: with the norm of the layer, without the bias of the
projection, before the rotary embedding.

Shapes: N positions, D hidden size, B bytes of a state, H kept query heads, G kept key heads, d head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.cache.plan import Heads
from distill.cache.projection import Projection
from distill.errors import UsageError
from distill.teacher.heads import refusal

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


class InnerProjector:
    """The projections of inner layers on the engine's device: a layer's inputs in, quantised coordinates out."""

    def __init__(self, projection: Projection, device: torch.device) -> None:
        self._layers = {
            layer: tuple(torch.from_numpy(array).to(device) for array in (inner.down.T, inner.centre, inner.step))
            for layer, inner in projection.layers.items()
        }

    def __call__(self, inputs: dict[int, Tensor]) -> dict[str, Tensor]:
        """Layer -> [N, D] as ``layer<i>_hidden`` -> int8 [N, B], by the quantiser of ``distill.cache.inner``."""
        columns: dict[str, Tensor] = {}
        for layer, (down_DB, centre_B, step_B) in self._layers.items():
            levels_NB = ((inputs[layer].float() @ down_DB - centre_B) / step_B).floor()
            columns[f"layer{layer}_hidden"] = levels_NB.clamp(-128, 127).to(torch.int8)
        return columns


def head_columns(layer: int, q_NHd: Tensor, k_NGd: Tensor) -> dict[str, Tensor]:
    """Queries and keys as the columns of a layer: int8 [N, H * d] with a float32 scale for each position and head."""
    columns: dict[str, Tensor] = {}
    for side, values in (("q", q_NHd.float()), ("k", k_NGd.float())):
        scale = values.abs().amax(2) / 127
        levels = (values / scale.clamp(min=1e-30)[:, :, None]).round().clamp(-127, 127)
        columns[f"layer{layer}_{side}"] = levels.to(torch.int8).flatten(1)
        columns[f"layer{layer}_{side}_scale"] = scale
    return columns


def queries_and_keys(attention: Any, normed_ND: Tensor, kept: Heads) -> tuple[Tensor, Tensor]:
    """Kept queries [N, H, d] and keys [N, G, d] of a transformers attention module, from its input."""
    if hasattr(attention, "qkv_proj"):
        num = attention.num_key_value_groups
        all_rows = attention.qkv_proj.weight.unflatten(0, (-1, kept.head_dim))  # queries, keys, values
        num_keys = len(all_rows) // (num + 2)
        q_rows, k_rows = all_rows[: num * num_keys], all_rows[num * num_keys : (num + 1) * num_keys]
    else:
        q_rows = attention.q_proj.weight.unflatten(0, (-1, kept.head_dim))
        k_rows = attention.k_proj.weight.unflatten(0, (-1, kept.head_dim))
    q_NHd = (normed_ND @ q_rows[list(kept.heads)].flatten(0, 1).T).unflatten(1, (-1, kept.head_dim))
    k_NGd = (normed_ND @ k_rows[list(kept.kv_heads)].flatten(0, 1).T).unflatten(1, (-1, kept.head_dim))
    if getattr(attention, "q_norm", None) is not None:
        q_NHd, k_NGd = attention.q_norm(q_NHd), attention.k_norm(k_NGd)
    return q_NHd, k_NGd


def _check_weights(attention: Any, kept: Heads) -> None:
    weights = [getattr(attention, name).weight for name in ("qkv_proj", "q_proj", "k_proj") if hasattr(attention, name)]
    if any(weight.dtype not in _PLAIN for weight in weights):
        raise refusal(kept, "transformers keeps its projections quantised, while vllm could multiply with them")


class LayerInputs:
    """Keeps the inputs of a transformers model's chosen layers, from one ``clear`` to the next.

    A forward pass over a batch leaves [batch, S, D] for each layer; the steps of a generation are joined along S.
    """

    def __init__(self, model: Any, *, layers: Sequence[int], heads: Sequence[Heads]) -> None:
        decoder = model.get_decoder()
        self._decoder = decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)
        self._heads = tuple(heads)
        self._seen: dict[int, list[Tensor]] = {layer: [] for layer in {*layers, *(kept.layer for kept in heads)}}
        if self._seen and not hasattr(self._decoder, "layers"):
            raise UsageError(
                f"{type(decoder).__name__} does not show its layers where other decoders do. Keep no inner layers and "
                "no heads, or try --engine vllm."
            )
        for kept in self._heads:
            _check_weights(self._decoder.layers[kept.layer].self_attn, kept)
        for layer in self._seen:
            self._watch(layer)

    def clear(self) -> None:
        """Forgets what earlier passes left."""
        for steps in self._seen.values():
            steps.clear()

    def of_row(self, row: int, num: int) -> dict[int, Tensor]:
        """Layer -> [num, D]: the first ``num`` positions of a row of the batch."""
        return {
            layer: torch.cat([states_BSD[row] for states_BSD in steps])[:num] for layer, steps in self._seen.items()
        }

    def head_columns(self, inputs: dict[int, Tensor]) -> dict[str, Tensor]:
        """The columns of the kept heads."""
        columns: dict[str, Tensor] = {}
        for kept in self._heads:
            layer = self._decoder.layers[kept.layer]
            normed_ND = layer.input_layernorm(inputs[kept.layer])
            columns |= head_columns(kept.layer, *queries_and_keys(layer.self_attn, normed_ND, kept))
        return columns

    def _watch(self, layer: int) -> None:
        def keep(_module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            self._seen[layer].append(arguments[0] if arguments else options["hidden_states"])

        self._decoder.layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
