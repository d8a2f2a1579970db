"""A model in vLLM flows in, its LM head flows out, as capture needs it: this rank's rows, without padding.

Names that vLLM does not promise are listed in ``distill.teacher.vllm_names``.
"""

from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from distill.teacher.capture import Head, can_compile


class _StopAtHeadError(Exception):
    """Carries the arguments of a LogitsProcessor's call out of the model."""


def find_head(model: Any, vocab_size: int, *, float32: bool) -> Head:
    """This rank's slice of the LM head. ``vocab_size`` cuts the padding that checkpoints carry (Qwen's 152,064).

    Models name their heads differently (Gemma has none but its embedding), so the model is asked for logits and
    stopped where it hands its head to the LogitsProcessor.
    """
    processor = _logits_processor(model)
    lm_head, bias = _head_given_to(processor, _language_model(model))
    weight = getattr(lm_head, "weight", None)
    if weight is None or not weight.is_floating_point():
        raise RuntimeError("the LM head is quantised; capture needs a checkpoint whose head is not")
    first = int(lm_head.shard_indices.org_vocab_start_index)
    num_ids = min(int(lm_head.shard_indices.num_org_elements), vocab_size - first)
    if num_ids < 1:
        raise RuntimeError(f"rank {get_tp_group().rank_in_group} holds no real token; use fewer tensor-parallel ranks")
    return Head(
        weight,
        first_id=first,
        num_ids=num_ids,
        bias=bias,
        soft_cap=processor.soft_cap,
        scale=float(processor.scale),
        float32=float32,
        compiled=can_compile(weight.device),
    )


def forbid_padding(model: Any, vocab_size: int) -> None:
    """Keeps the padding that checkpoints carry out of the teacher's answers; vLLM forbids only its own."""

    def forbid(_processor: torch.nn.Module, _arguments: Any, logits_NV: torch.Tensor | None) -> torch.Tensor | None:
        if logits_NV is not None and logits_NV.shape[-1] > vocab_size:
            logits_NV[..., vocab_size:] = float("-inf")
        return logits_NV

    _logits_processor(model).register_forward_hook(forbid)


def _language_model(model: Any) -> Any:
    return model.get_language_model() if hasattr(model, "get_language_model") else model


def _logits_processor(model: Any) -> LogitsProcessor:
    processors = [module for module in _language_model(model).modules() if isinstance(module, LogitsProcessor)]
    if len(processors) != 1:
        raise RuntimeError(f"expected one LogitsProcessor in {type(model).__name__}, found {len(processors)}")
    return processors[0]


def _head_given_to(processor: torch.nn.Module, language_model: Any) -> tuple[Any, torch.Tensor | None]:
    def stop(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _StopAtHeadError(arguments)

    weight = next(language_model.parameters())
    dim = language_model.config.get_text_config().hidden_size
    probe_1D = torch.linspace(-1, 1, dim, dtype=weight.dtype, device=weight.device)[None]
    handle = processor.register_forward_pre_hook(stop)
    try:
        language_model.compute_logits(probe_1D)
    except _StopAtHeadError as call:
        lm_head, hidden_1D, *rest = call.args[0]
    else:
        raise RuntimeError(f"{type(language_model).__name__}.compute_logits never calls its LogitsProcessor")
    finally:
        handle.remove()
    if not torch.equal(hidden_1D, probe_1D):
        raise RuntimeError(f"{type(language_model).__name__} changes its hidden states before the LM head")
    return lm_head, rest[0] if rest else getattr(lm_head, "bias", None)
