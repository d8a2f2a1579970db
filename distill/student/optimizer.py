"""Named parameters and a step number flow in, an AdamW optimizer and its learning rate flow out."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.config import TrainConfig
from distill.student.quantised import quantising_library
from distill.student.sharding import as_parameter, is_sharded, whole


def make_optimizer(
    parameters: Sequence[tuple[str, nn.Parameter]], config: TrainConfig, *, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), in 8 bits where ``config.optimizer`` says so (Dettmers et al. 2022).

    Vectors, which are norms and biases, do not decay.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for _, value in parameters:
        # Sharded and whole tensors apart, since AdamW works on a group's tensors at once.
        groups.setdefault((value.ndim < 2, is_sharded(value)), []).append(value)
    settings = [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else config.weight_decay} for key in sorted(groups)
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(settings, lr=learning_rate)
    bitsandbytes = quantising_library(f"optimizer {config.optimizer}")
    kind = bitsandbytes.optim.PagedAdamW8bit if config.optimizer == "paged_adamw_8bit" else bitsandbytes.optim.AdamW8bit
    made: torch.optim.Optimizer = kind(settings, lr=learning_rate)
    return made


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
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]], *, keep: bool = True
) -> dict[str, Tensor]:
    """The optimizer's state as whole named tensors on the CPU: "<parameter>/<entry>".

    All ranks must call it; one that does not ``keep`` them gets nothing.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters:
        for entry, value in optimizer.state.get(parameter, {}).items():
            if keep or is_sharded(value):
                complete = whole(value) if isinstance(value, Tensor) else torch.tensor(value)
                if keep:
                    tensors[f"{name}/{entry}"] = complete
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]], path: Path
) -> None:
    """Put back what ``optimizer_tensors`` gave, from a safetensors file. Raises KeyError for an unknown parameter."""
    by_name = dict(parameters)
    counts_in_tensors = isinstance(optimizer, torch.optim.AdamW)
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            name, entry = key.rsplit("/", 1)
            parameter, value = by_name[name], file.get_tensor(key)
            if entry == "step":  # AdamW counts on the CPU, bitsandbytes in plain numbers
                optimizer.state[parameter][entry] = value if counts_in_tensors else int(value)
            else:
                optimizer.state[parameter][entry] = as_parameter(value, parameter)
