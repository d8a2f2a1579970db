"""Protects the cost of a step: every variant trains, both loops with the teacher in memory learn the same, ratios."""

import dataclasses
import json

import pytest
import torch

from benchmarks import step

TOKENS = 2 * step.LENGTH


@pytest.fixture(autouse=True)
def tiny(teacher, monkeypatch):
    """The tiny teacher in the place of SmolLM2, and shapes that fit its vocabulary."""
    monkeypatch.setattr("examples.smollm2.teacher_folder", lambda: teacher)
    monkeypatch.setattr(step, "TOP_K", 2)
    monkeypatch.setattr(step, "RANK", 8)


def test_both_loops_with_the_teacher_in_memory_learn_the_same():
    updates = []
    for variant in ("online", "online_fused"):
        student = step.load("small", variant, "fp32")
        with torch.no_grad():
            for value in student.model.parameters():  # else it is the teacher, whose divergence has no gradient
                value.mul_(1.1)
        before = [value.detach().clone() for value in student.model.parameters()]
        student = dataclasses.replace(student, optimizer=torch.optim.SGD(student.model.parameters(), lr=1.0))
        step.stepper(student, variant, TOKENS)()
        updates.append([new - old for new, old in zip(student.model.parameters(), before, strict=True)])
    for plain, fused in zip(*updates, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, fused, rtol=1e-3, atol=1e-5)


def test_figures_are_ratios_of_what_was_measured(monkeypatch, tmp_path, capsys):
    peaks = dict(zip(step.VARIANTS["adapters"], (10, 20, 30, 40, 50), strict=True))
    monkeypatch.setattr(step, "peaks", lambda *_arguments, **_options: peaks)
    file = tmp_path / "step.json"
    step.main(["--only", "adapters", "--repeats", "1", "--tokens", str(TOKENS), "--json", str(file)])
    figures = json.loads(file.read_text())
    seconds = figures["adapters"]["seconds"]
    assert set(seconds) == set(step.VARIANTS["adapters"])
    assert min(seconds.values()) > 0
    for name in ("online", "online_fused"):
        ratio = seconds[name] / seconds["cached"]
        assert figures[f"{name}_over_cached_time"] == pytest.approx(ratio, rel=0.05)
        assert figures[f"{name}_over_cached_memory"] == peaks[name] / 10
    assert json.loads(capsys.readouterr().out.split("\n", 1)[1]) == figures


def test_adapters_train_alone_and_a_frozen_weight_costs_no_gradient():
    whole, adapted = (step.load(name, "ce", "fp32") for name in ("small", "adapters"))
    assert adapted.flops["head"] == whole.flops["head"] * 4 / 6
    step.stepper(adapted, "cached", TOKENS)()
    trained = [name for name, value in adapted.model.named_parameters() if value.requires_grad]
    assert all("lora_" in name for name in trained)
    moments = adapted.optimizer.state.values()
    assert len(moments) == len(trained)
    assert any(moment["exp_avg"].abs().max() > 0 for moment in moments)


def test_a_peak_is_measured_in_a_process_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(step, "DEEP", {**step.DEEP, "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1})
    step.main(["--peak", "deep", "cached", "--tokens", str(TOKENS)])
    assert int(capsys.readouterr().out) >= 0
