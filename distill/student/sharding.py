"""A loaded student flows in; one whose weights are spread over the ranks (FSDP2) flows out, and whole tensors of it.

Each decoder layer is gathered where its forward or backward pass runs, and its gradients are summed and spread again.
The LM head is used outside any module's forward pass, so the losses gather it themselves; see ``gathered``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from distill.config import TrainConfig
from distill.errors import UsageError
from distill.student.precision import Precision
from distill.student.ranks import Ranks
from distill.student.shrink import find_layers

_ROOM = 0.6  # of a GPU's memory, that weights and the optimizer's state may fill before they are sharded


def wants_sharding(config: TrainConfig, model: Any, precision: Precision, ranks: Ranks) -> bool:
    """Whether ``config.parallel`` shards this model; ``auto`` does where a GPU has no room for a whole copy.

    A copy is 16 bytes for each weight that trains (weight, gradient, two moments, in float32), and the compute dtype
    for one that does not. Raises UsageError for what cannot be sharded.
    """
    if ranks.world == 1 or config.parallel == "ddp":
        return False
    obstacle = _obstacle(config, precision)
    if config.parallel == "auto":
        if obstacle is not None or precision.device.type != "cuda":
            return False
        num = sum(parameter.numel() for parameter in model.parameters())
        bytes_each = 16 if config.tune == "full" else precision.compute_dtype.itemsize
        memory = torch.cuda.get_device_properties(precision.device).total_memory
        return ranks.any(num * bytes_each > _ROOM * memory)
    if obstacle is not None:
        raise UsageError(f"{obstacle} cannot be trained with parallel fsdp. Change it, or use parallel ddp.")
    return True


def _obstacle(config: TrainConfig, precision: Precision) -> str | None:
    """What stands against sharding: a gradient scale of each rank, weights or moments of another library."""
    if precision.scales_gradients:
        return "precision fp16"
    if config.quantise != "none":
        return f"quantise {config.quantise}"
    return None if config.optimizer == "adamw" else f"optimizer {config.optimizer}"


def shard(model: Any, decoder: nn.Module, precision: Precision, ranks: Ranks) -> None:
    """Spread the weights of ``model`` (its ``decoder`` and LM head) over the ranks, in place.

    Every rank must have loaded the same weights; each keeps its part on its device.
    """
    found = find_layers(decoder, model.config.get_text_config().num_hidden_layers)
    if found is None:
        raise UsageError(
            f"{type(model).__name__} keeps its layers where distill does not find them, so that they cannot be "
            "sharded. Use parallel ddp."
        )
    mesh = init_device_mesh(precision.device.type, (ranks.world,))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    modules = [*getattr(*found), decoder, *([] if tied else [model.get_output_embeddings()])]
    for module in modules:
        sharded: FSDPModule = fully_shard(module, mesh=mesh)
        # Losses are divided by the tokens of all ranks already: gradients are summed, not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.to(precision.device)  # buffers outside the decoder


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded parameter, for use outside its module; its gradient is summed over the ranks."""
    return tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, on the CPU and cut off from any graph. All ranks must call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


def as_parameter(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """``value``, whole and with the shape of ``parameter``, on its device and sharded as it is."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        on_device = value.to(parameter.device)
        return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value.to(parameter.device)


def is_sharded(value: object) -> bool:
    """Whether each rank has only a part of a tensor."""
    return isinstance(value, DTensor)


def gradient_norm(parameters: Sequence[nn.Parameter], ranks: Ranks) -> float:
    """The Euclidean norm of all gradients together; 0 without any. Whole ones must be equal on all ranks."""
    squares = {True: [torch.zeros(())], False: [torch.zeros(())]}
    for parameter in parameters:
        if parameter.grad is not None:
            part = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            squares[is_sharded(parameter)].append(part.float().square().sum().cpu())
    sharded = torch.stack(squares[True]).double().sum()
    if any(is_sharded(parameter) for parameter in parameters):
        ranks.sum([sharded])
    return float((sharded + torch.stack(squares[False]).double().sum()).sqrt())


def scale_gradients(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Multiply all gradients by ``factor``."""
    for parameter in parameters:
        if parameter.grad is not None:
            part = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            part.mul_(factor)
