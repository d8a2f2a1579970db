"""Protects the learning rate (it decays over the real number of steps) and the state of AdamW across a save."""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distill.config import TrainConfig
from distill.student.optimizer import learning_rate_factor, make_optimizer, optimizer_tensors, restore_optimizer


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_the_rate_rises_to_its_peak_and_decays_within_the_stage(num_steps, warmup):
    factors = [learning_rate_factor(step, num_steps=num_steps, warmup=warmup) for step in range(num_steps)]
    assert max(factors) == pytest.approx(1.0)
    peak = factors.index(max(factors))
    assert all(low < high for low, high in itertools.pairwise(factors[: peak + 1]))
    assert all(high > low for high, low in itertools.pairwise(factors[peak + 1 :]))
    assert min(factors) > 0  # no step is wasted


def test_known_values():
    factors = [learning_rate_factor(step, num_steps=12, warmup=1 / 6) for step in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.5)
    assert learning_rate_factor(12, num_steps=12, warmup=1 / 6) == pytest.approx(0.0)


def test_norms_and_biases_do_not_decay():
    layer = nn.Linear(3, 2)
    config = TrainConfig(cache="c", student="s", out="o", weight_decay=0.5)
    optimizer = make_optimizer(list(layer.named_parameters()), config, learning_rate=0.1)
    decays = {len(group["params"][0].shape): group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {2: 0.5, 1: 0.0}


def test_a_restored_optimizer_takes_the_same_step(tmp_path):
    torch.manual_seed(0)
    layer, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    config = TrainConfig(cache="c", student="s", out="o", weight_decay=0.1)
    optimizers = [make_optimizer(list(m.named_parameters()), config, learning_rate=0.1) for m in (layer, twin)]
    x = torch.randn(5, 3)
    layer(x).sum().backward()
    optimizers[0].step()
    twin.load_state_dict(layer.state_dict())
    saved = optimizer_tensors(optimizers[0], list(layer.named_parameters()))
    save_file(saved, tmp_path / "trainer.safetensors")
    restore_optimizer(optimizers[1], list(twin.named_parameters()), tmp_path / "trainer.safetensors")
    for module, optimizer in zip((layer, twin), optimizers, strict=True):
        module.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight, twin.weight)
    assert torch.equal(layer.bias, twin.bias)
