"""peft's wrapper of a model flows in, the plain model with the adapter in its weights flows out, or a refusal.

That a merged model is what was trained cannot be told from its outputs in bfloat16, where rounding of all weights says
more than a short training. It can from single weights: each must be the nearest number of its type to the weight with
which the layer multiplies in float64 when its adapter is beside it.

``P`` probed columns of a weight, ``I`` inputs and ``O`` outputs of a layer.
"""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import CorruptionError
from distill.student.adapter import adapted_layers, refuse_tied

_COLUMNS = 16
# Of the norm, beyond the rounding of a type. Right merges have 0 in all types. One left out in bfloat16 has 2e-6
# where B is as large as a first step of 1e-5 makes it, 7e-8 where it is 1e-6 and changes one weight in two thousand.
_LIMIT = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Some columns of the weight with which a layer multiplies, as its forward pass has them, in float64."""

    inputs: Tensor  # [1 + P, I]: zeros, then one 1 each; or P ids of an embedding
    outputs: Tensor  # [1 + P, O]: the bias, then columns; or P rows


@torch.no_grad()
def columns_of(model: Any) -> dict[str, Columns]:
    """What the adapted linear layers and embeddings of peft's ``model`` multiply with, by name in the plain model."""
    found = {}
    for name, layer in adapted_layers(model):
        inputs = _probe(layer)
        if inputs is not None:
            found[name] = Columns(inputs=inputs, outputs=_outputs(layer, inputs))
    return found


def merged(model: Any, adapter: Path) -> Any:
    """The plain model of peft's ``model``, whose layers are changed in place. Raises UsageError for tied layers.

    Each layer is merged in float64 and rounded once; some of peft's kinds would round what they add as well.
    """
    refuse_tied(model, f"the adapter in {adapter}")
    for _, layer in adapted_layers(model):
        if hasattr(layer, "merge"):
            base = layer.get_base_layer()
            dtype = next(base.parameters()).dtype
            layer.double()
            layer.merge()
            base.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return model.merge_and_unload()


@torch.no_grad()
def refuse_unmerged(plain: Any, wanted: Mapping[str, Columns], adapter: Path) -> None:
    """Raise CorruptionError where a layer of ``plain`` has not the weights, but for rounding, that it had adapted."""
    for name, columns in wanted.items():
        layer = plain.get_submodule(name)
        exact, got = columns.outputs, _outputs(layer, columns.inputs.to(layer.weight.device))
        rounding = (exact.to(layer.weight.dtype).double() - exact).abs()
        error = float(((got - exact).abs() - rounding).norm() / exact.norm().clamp(min=1e-30))
        if not error <= _LIMIT:
            raise CorruptionError(
                f"the adapter in {adapter} is not merged as it was trained: the weights of {name} are off by "
                f"{error:.1e} of their norm beyond rounding. Use --dtype float32 in an export, and a version of peft "
                "that distill asks for."
            )


def _probe(layer: Any) -> Tensor | None:
    """Inputs that single out columns of a layer; None for kinds of layers that are not known."""
    from transformers.pytorch_utils import Conv1D

    base: nn.Module = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
    if type(base) is nn.Embedding:
        return _telling_ids(layer, base)
    if not isinstance(base, nn.Linear | Conv1D):
        return None
    num_inputs = base.in_features if isinstance(base, nn.Linear) else base.weight.shape[0]
    inputs = torch.zeros(1 + _COLUMNS, num_inputs, dtype=torch.float64, device=base.weight.device)
    columns = torch.arange(_COLUMNS)
    inputs[1 + columns, columns * num_inputs // _COLUMNS] = 1
    return inputs


def _telling_ids(layer: Any, base: nn.Embedding) -> Tensor:
    """The ids that an adapter of an embedding changes most, since training leaves those that it never met."""
    size = torch.zeros(base.num_embeddings, device=base.weight.device)
    for low_rank in getattr(layer, "lora_embedding_A", {}).values():
        size += low_rank.norm(dim=0)
    return size.topk(min(_COLUMNS, base.num_embeddings)).indices


def _outputs(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What comes out of a layer in float64, the bias apart."""
    outputs: Tensor = deepcopy(layer).eval().double()(inputs)
    if inputs.is_floating_point():
        outputs[1:] -= outputs[0].clone()
    return outputs
