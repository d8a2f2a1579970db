"""The loss for other people's trainers equals the stage's own, fused or from logits, and refuses what does not fit.

What it protects: ``distill.kd_loss`` and ``distill.kd_loss_from_logits``.
"""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import distill
from distill.cache.tail import rebuild
from distill.student.losses.fused import Head


@pytest.fixture
def model(world: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(world.student, dtype=torch.float32)


def first_batch(world: Any, temperature: float, tail: Any = "low_rank") -> distill.Batch:
    return next(iter(distill.batches(world.cache, temperature=temperature, batch_tokens=100, tail=tail)))


def hidden_of(model: Any, batch: distill.Batch) -> torch.Tensor:
    states: torch.Tensor = model.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return states


def test_it_is_the_mean_by_the_book(world: Any, model: Any) -> None:
    batch = first_batch(world, 2.0)
    assert batch.coords is not None
    assert batch.tail is not None
    tail = batch.tail.on(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits_NV = model.lm_head(hidden_of(model, batch)).flatten(0, 1)[batch.trained, : batch.vocab_size].double()
        got = distill.kd_loss(hidden_of(model, batch), model.lm_head.weight, batch, kl_weight=0.7, ce_weight=0.3)
    p_NV = torch.from_numpy(
        rebuild(
            "low_rank",
            temperature=2.0,
            topk_ids_NK=batch.teacher.topk_ids.int().numpy(),
            topk_logprobs_NK=2.0 * batch.teacher.topk_log_p.numpy(),  # log_z is in it already
            log_z_N=torch.zeros(batch.num_trained).numpy(),
            log_tail_N=batch.teacher.log_tail.numpy(),
            tail_logits_NV=tail.logits(batch.coords).numpy(),
        )
    )
    kl = 4 * (p_NV * (p_NV.clamp(min=1e-300).log() - (logits_NV / 2).log_softmax(1))).sum(1).mean()
    ce = -logits_NV.log_softmax(1).gather(1, batch.labels[:, None]).mean()
    assert float(got) == pytest.approx(float(0.7 * kl + 0.3 * ce), rel=1e-5)


@pytest.mark.parametrize("tail", ["low_rank", "bucket"])
@pytest.mark.parametrize("divergence", [distill.Divergence(), distill.Divergence(name="js", beta=0.5)])
def test_fused_and_from_logits_agree_in_value_and_gradient(
    world: Any, model: Any, tail: str, divergence: distill.Divergence
) -> None:
    batch = first_batch(world, 4.0, tail)
    hidden_BSD = hidden_of(model, batch)
    weights = {"kl_weight": 0.9, "ce_weight": 0.1, "divergence": divergence}
    losses = {
        "fused": distill.kd_loss(hidden_BSD, model.lm_head.weight, batch, chunk=7, **weights),
        "trained": distill.kd_loss(hidden_BSD.flatten(0, 1)[batch.trained], model.lm_head.weight, batch, **weights),
        "logits": distill.kd_loss_from_logits(model.lm_head(hidden_BSD), batch, **weights),
    }
    parameters = list(model.parameters())
    gradients = {name: torch.autograd.grad(loss, parameters, retain_graph=True) for name, loss in losses.items()}
    for name, loss in losses.items():
        assert float(loss.detach()) == pytest.approx(float(losses["logits"].detach()), rel=1e-5), name
        for ours, theirs in zip(gradients[name], gradients["logits"], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6), name


def test_products_run_in_the_dtype_of_autocast(world: Any, model: Any) -> None:
    batch = first_batch(world, 2.0)
    exact = float(distill.kd_loss(hidden_of(model, batch), model.lm_head.weight, batch).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distill.kd_loss(hidden_of(model, batch), model.lm_head.weight, batch)
    loss.backward()
    assert loss.dtype == model.lm_head.weight.grad.dtype == torch.float32
    assert float(loss.detach()) != exact
    assert float(loss.detach()) == pytest.approx(exact, rel=0.02)


def test_a_head_may_scale_and_cap(world: Any, model: Any) -> None:
    batch = first_batch(world, 1.0)
    head = Head(
        weight=model.lm_head.weight,
        bias=torch.linspace(-1, 1, len(model.lm_head.weight)),
        vocab_size=batch.vocab_size,
        scale=0.5,
        soft_cap=5.0,
        compute_dtype=torch.float32,
    )
    hidden_BSD = hidden_of(model, batch)
    logits_BSV = 0.5 * 5.0 * torch.tanh((model.lm_head(hidden_BSD) + head.bias) / 5.0)
    expected = distill.kd_loss_from_logits(logits_BSV, batch)
    assert float(distill.kd_loss(hidden_BSD, head, batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_what_does_not_fit_is_refused(world: Any, model: Any) -> None:
    batch = first_batch(world, 2.0)
    hidden_BSD, weight = hidden_of(model, batch), model.lm_head.weight
    with pytest.raises(distill.UsageError, match="hidden has shape"):
        distill.kd_loss(hidden_BSD[:, 1:], weight, batch)
    with pytest.raises(distill.UsageError, match="one must be above 0"):
        distill.kd_loss(hidden_BSD, weight, batch, kl_weight=0.0)
    with pytest.raises(distill.IdentityError, match="head has 100 rows"):
        distill.kd_loss(hidden_BSD, weight[:100], batch)
    with pytest.raises(distill.UsageError, match="logits has shape"):
        distill.kd_loss_from_logits(model.lm_head(hidden_BSD)[:1, :-1], batch)
    with pytest.raises(distill.IdentityError, match="head has 299 rows"):
        distill.kd_loss_from_logits(model.lm_head(hidden_BSD)[..., :299], batch)
