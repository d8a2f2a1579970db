"""Named parameters and a step number flow in, an AdamW optimizer and its learning rate flow out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def adamw(
    parameters: Sequence[tuple[str, nn.Parameter]], *, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019). Vectors, which are norms and biases, do not decay."""
    matrices = [value for _, value in parameters if value.ndim >= 2]
    vectors = [value for _, value in parameters if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate)


def learning_rate_factor(step: int, *, num_steps: int, warmup: float) -> float:
    """The share of the peak learning rate at a step, counted from 0.

    With w = floor(warmup num_steps), one less where that would leave no step to decay: (step + 1) / w before w, then
    (1 + cos(π (step - w) / (num_steps - w))) / 2, which reaches 0 where the stage ends.
    """
    warmup_steps = min(int(warmup * num_steps), num_steps - 1)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps))) / 2


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: "<parameter>/<entry>"."""
    return {
        f"{name}/{entry}": value.detach().cpu().contiguous()
        for name, parameter in parameters
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]
) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    by_name = dict(parameters)
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        parameter = by_name[name]
        on_device = value if entry == "step" else value.to(parameter.device)  # AdamW counts steps on the CPU
        optimizer.state[parameter][entry] = on_device
