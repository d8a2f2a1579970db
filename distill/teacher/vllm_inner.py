"""Inner layers inside a vLLM worker: the model runner's state flows in, inputs of layers and columns flow out.

vLLM hands out what a layer takes in as auxiliary hidden states, which it computes for the draft models of speculative
decoding. Models that have none are watched by hooks, which is possible only where vLLM runs them eagerly. Queries and
keys are computed again from a layer's input, on every tensor-parallel rank for the heads that it has.

Shapes: N positions, D hidden size, H kept query heads, G kept key heads, d head dimension.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed import get_pp_group, get_tp_group

from distill.cache.plan import Heads
from distill.cache.projection import Projection
from distill.config import TargetsConfig
from distill.teacher.heads import group_size, kept_heads
from distill.teacher.inner import InnerProjector, head_columns


class InnerLayers:
    """The chosen layers of a worker's model. Made when the model is loaded and before its first forward pass.

    ``refusal`` says why this model cannot give them, in words for a person, or is None.
    """

    def __init__(self, runner: Any, *, targets: TargetsConfig, eager: bool) -> None:
        model = runner.get_model()
        language_model = model.get_language_model() if hasattr(model, "get_language_model") else model
        self._config = language_model.config.get_text_config()
        self._layers = getattr(language_model, "model", language_model).layers
        self._heads = kept_heads(self._config, targets)
        self._projector: InnerProjector | None = None
        self._seen: dict[int, torch.Tensor] = {}
        self.layers = tuple(sorted({*targets.layers, *targets.heads}))
        supported = bool(self.layers) and _hands_out(model)
        # Eagerly, the first layer adds to its input in place after it was handed out.
        hooked = {layer for layer in self.layers if not supported or (eager and layer == 0)}
        self._handed_out = tuple(layer for layer in self.layers if layer not in hooked)
        self.refusal = self._refusal(type(model).__name__, hooked=bool(hooked), eager=eager)
        if self.refusal:
            return
        for layer in hooked:
            self._watch(layer)
        if self._handed_out:
            model.set_aux_hidden_state_layers(self._handed_out)
            runner.use_aux_hidden_state_outputs = True

    def _refusal(self, model: str, *, hooked: bool, eager: bool) -> str | None:
        if self.layers and get_pp_group().world_size > 1:
            return "inner layers cannot be had with pipeline parallelism; use tensor_parallel_size instead"
        if hooked and not eager:
            return f"vllm gives no inner layers of {model} unless engine_options.enforce_eager is true"
        return None

    def inputs(self, state: Any, index: torch.Tensor) -> dict[int, torch.Tensor]:
        """Layer -> [N, D]: rows ``index`` of the step that ran last, whose ``state`` the model runner keeps."""
        if not self.layers:
            return {}
        handed_out = dict(zip(self._handed_out, state.aux_hidden_states or (), strict=True))
        return {layer: states.index_select(0, index) for layer, states in (handed_out | self._seen).items()}

    def install(self, projection: Projection | None, device: torch.device) -> None:
        """Sets the projection of ``columns``."""
        self._projector = InnerProjector(projection, device) if projection else None

    def columns(self, inputs: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The columns of layers and heads; every rank must call this, since each has some of the heads."""
        if self._projector is None:
            return {}
        columns = self._projector(inputs)
        for kept in self._heads:
            columns |= head_columns(kept.layer, *self._queries_and_keys(inputs[kept.layer], kept))
        return columns

    def _queries_and_keys(self, input_ND: torch.Tensor, kept: Heads) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept queries [N, H, d] and keys [N, G, d] float32, the same on every rank."""
        layer = self._layers[kept.layer]
        attention, size = layer.self_attn, kept.head_dim
        normed_ND = layer.input_layernorm(input_ND)
        packed = attention.qkv_proj.quant_method.apply(attention.qkv_proj, normed_ND, None)  # without the bias
        num_q, num_k = attention.num_heads, attention.num_kv_heads
        q, k, _ = packed.split([num_q * size, num_k * size, num_k * size], dim=-1)
        if getattr(attention, "q_norm", None) is not None:
            q = attention.q_norm(q.reshape(-1, size)).view(q.shape)
            k = attention.k_norm(k.reshape(-1, size)).view(k.shape)
        tp = get_tp_group()
        num_all_keys = self._config.num_attention_heads // group_size(self._config)
        replicas = max(1, tp.world_size // num_all_keys)  # ranks that hold the same key heads
        first_key = tp.rank_in_group // replicas * num_k if tp.rank_in_group % replicas == 0 else None
        own_q = _placed(q.unflatten(1, (num_q, size)), first=tp.rank_in_group * num_q, wanted=kept.heads)
        own_k = _placed(k.unflatten(1, (num_k, size)), first=first_key, wanted=kept.kv_heads)
        both = torch.cat([own_q, own_k], dim=1)
        if tp.world_size > 1:
            from vllm.distributed import tensor_model_parallel_all_reduce

            both = tensor_model_parallel_all_reduce(both)  # of each head, all ranks but one add zeros
        return both[:, : len(kept.heads)], both[:, len(kept.heads) :]

    def _watch(self, layer: int) -> None:
        module = self._layers[layer]
        parameters = inspect.signature(module.forward)

        def keep(_module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            given = parameters.bind(*arguments, **options).arguments
            states, residual = given["hidden_states"], given.get("residual")
            self._seen[layer] = states.clone() if residual is None else states + residual

        module.register_forward_pre_hook(keep, with_kwargs=True)


def _hands_out(model: Any) -> bool:
    # Imported here: where no inner layers are asked for, a release without these names serves as well.
    from vllm.model_executor.models.interfaces import supports_eagle3

    return bool(supports_eagle3(model))


def _placed(own_NHd: torch.Tensor, *, first: int | None, wanted: Sequence[int]) -> torch.Tensor:
    """The wanted heads, [N, wanted, d] float32: this rank's, which begin with ``first``, and zeros for the others'."""
    placed = torch.zeros(len(own_NHd), len(wanted), own_NHd.shape[2], device=own_NHd.device)
    for place, head in enumerate(wanted):
        if first is not None and first <= head < first + own_NHd.shape[1]:
            placed[:, place] = own_NHd[:, head - first]
    return placed
