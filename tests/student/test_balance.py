"""Protects gradient balancing: measured norms are the true ones, weights follow the equation, a resume is exact."""

from dataclasses import replace

import numpy as np
import pytest

from distill.errors import RetryError
from distill.student import checkpoint
from distill.student.balance import balanced, smoothed
from distill.student.trainer import train_stage
from tests.student.conftest import LENGTH, logged, stop_at

WEIGHTS = {"kl": 0.7, "ce": 0.3, "feature": 0.2, "contrastive": 0.1}
BALANCED = {"balance": True, "balance_every": 3, "temperature": 2.0, "weights": WEIGHTS}
LORA = {"tune": "lora", "lora": {"r": 4, "dropout": 0.0, "target_modules": ["q_proj", "up_proj", "down_proj"]}}


def test_each_loss_gets_its_part_of_the_gradient_and_the_whole_stays():
    norms = {"kl": 8.0, "ce": 2.0, "feature": 1.0, "contrastive": 4.0}
    weights = balanced({**WEIGHTS, "attention": 0.0}, norms)
    parts = {name: weights[name] * norm for name, norm in norms.items()}
    assert sum(parts.values()) == pytest.approx(0.7 * 8 + 0.3 * 2 + 0.2 + 0.4)
    assert [parts[name] / sum(parts.values()) for name in WEIGHTS] == pytest.approx([w / 1.3 for w in WEIGHTS.values()])
    assert weights["attention"] == 0


def test_weights_stay_within_bounds_and_as_given_where_nothing_is_known():
    weights = balanced(WEIGHTS, {"kl": 1.0, "ce": 1e-9, "feature": 0.0, "contrastive": 1.0})
    assert weights["ce"] == pytest.approx(3.0)
    assert weights["feature"] == pytest.approx(2.0)
    assert balanced(WEIGHTS, None) == WEIGHTS
    assert balanced(WEIGHTS, dict.fromkeys(WEIGHTS, 0.0)) == WEIGHTS
    assert balanced({"kl": 1.0, "ce": 1.0, "feature": 0.5}, {"kl": 4.0, "ce": 1.0}) == {
        "kl": pytest.approx(0.625),
        "ce": pytest.approx(2.5),
        "feature": 0.5,
    }


def test_norms_are_smoothed_and_an_overflow_is_left_out():
    assert smoothed(None, {"kl": 4.0}) == {"kl": 4.0}
    assert smoothed({"kl": 4.0}, {"kl": 14.0}) == {"kl": pytest.approx(7.0)}
    assert smoothed({"kl": 4.0}, {"kl": float("inf")}) == {"kl": 4.0}
    assert smoothed(None, {"kl": float("nan")}) is None
    assert smoothed({"kl": 4.0, "ce": 1.0}, {"kl": 4.0, "domain/a": 2.0}) == {
        "kl": pytest.approx(4.0),
        "ce": 1.0,
        "domain/a": pytest.approx(2.0),
    }


@pytest.mark.parametrize("changes", [{}, {"micro_batch_tokens": 4096}, {"gradient_checkpointing": True}])
def test_measured_norms_are_those_of_training_on_one_loss_alone(configured, tmp_path, changes):
    single = {}
    for name in ("kl", "ce"):
        stage = {"temperature": 2.0, "max_steps": 1, "weights": {"kl": 0, "ce": 0, name: 1}}
        train_stage(configured(stage=stage, out=str(tmp_path / name), **LORA), 1, quiet=True)
        single[name] = logged(tmp_path / name, "train")[0]["grad_norm"]
    stage = {**BALANCED, "max_steps": 1, "weights": {"kl": 0.7, "ce": 0.3}}
    train_stage(configured(stage=stage, **LORA, **changes), 1, quiet=True)
    assert checkpoint.read_state(tmp_path / "run" / "stage1" / "last").balance == pytest.approx(single, rel=1e-3)


def test_each_domain_gets_its_share_of_the_gradient(configured, tmp_path):
    """Norms of domains are those of training on one domain alone, and factors follow them."""
    stage = {"temperature": 2.0, "max_steps": 1, "batch_size": 12, "shares": {"general": 1, "medical": 1}}
    train_stage(configured(stage={**stage, "balance": "domain"}, **LORA), 1, quiet=True)
    norms = checkpoint.read_state(tmp_path / "run" / "stage1" / "last").balance
    assert set(norms) == {"domain/general", "domain/medical"}
    assert logged(tmp_path / "run", "train")[0]["gradient_norms"] == pytest.approx(norms)
    factors = logged(tmp_path / "run", "train")[0]["domain_weights"]
    parts = {domain: factor * norms[f"domain/{domain}"] for domain, factor in factors.items()}
    assert parts["general"] == pytest.approx(parts["medical"])  # their shares are equal
    assert sum(parts.values()) == pytest.approx(sum(norms.values()))
    alone = {"temperature": 2.0, "max_steps": 1, "batch_size": 6, "shares": {"medical": 1}}
    train_stage(configured(stage=alone, out=str(tmp_path / "alone"), **LORA), 1, quiet=True)
    assert norms["domain/medical"] == pytest.approx(logged(tmp_path / "alone", "train")[0]["grad_norm"], rel=1e-3)


def test_long_answers_do_not_outweigh_short_ones(configured, changed_cache, tmp_path):
    """Domains with equal shares and unequal numbers of tokens get equal parts of the step's gradient."""
    tokens = {"general": 2, "medical": 16}

    def last_tokens(prompt):
        return replace(prompt, loss_mask=np.arange(LENGTH - 1) >= LENGTH - 1 - tokens[prompt.domain])

    cache = str(changed_cache(last_tokens))
    stage = {"temperature": 2.0, "max_steps": 1}
    means = {}
    for domain in tokens:
        alone = {**stage, "batch_size": 6, "shares": {domain: 1}}
        train_stage(configured(stage=alone, cache=cache, out=str(tmp_path / domain), **LORA), 1, quiet=True)
        means[domain] = logged(tmp_path / domain, "train")[0]["grad_norm"]
    both = {**stage, "batch_size": 12, "shares": {"general": 1, "medical": 1}, "balance": "domain"}
    train_stage(configured(stage=both, cache=cache, **LORA), 1, quiet=True)
    factors = logged(tmp_path / "run", "train")[0]["domain_weights"]
    parts = {domain: means[domain] * num / 18 for domain, num in tokens.items()}  # of the gradient as it was
    assert parts["medical"] > 2 * parts["general"]
    assert factors["general"] * parts["general"] == pytest.approx(factors["medical"] * parts["medical"], rel=1e-3)
    assert sum(factors[domain] * part for domain, part in parts.items()) == pytest.approx(sum(parts.values()), rel=1e-3)


@pytest.mark.parametrize("tune", [LORA, {"tune": "full"}, {**LORA, "precision": "fp16"}], ids=["lora", "full", "fp16"])
def test_a_stopped_run_goes_on_with_the_same_weights(configured, tmp_path, monkeypatch, tune):
    whole, parted = tmp_path / "whole", tmp_path / "run"
    train_stage(configured(stage=BALANCED, out=str(whole), **tune), 1, quiet=True)
    stop_at(monkeypatch, step=5)  # measured before the steps 1, 4 and 7
    with pytest.raises(RetryError):
        train_stage(configured(stage=BALANCED, **tune), 1, quiet=True)
    monkeypatch.undo()
    train_stage(configured(stage=BALANCED, **tune), 1, quiet=True)
    ours, theirs = ([(line["losses"], line["weights"]) for line in logged(run, "train")] for run in (parted, whole))
    assert ours == theirs
    weights = [list(line["weights"].values()) for line in logged(whole, "train")]
    assert weights[0] == weights[1] == weights[2] != weights[3]
    assert set(logged(whole, "train")[0]["weights"]) == set(WEIGHTS)
    if tune.get("precision") != "fp16":  # which may overflow in the first measurement
        assert ["gradient_norms" in line for line in logged(whole, "train")] == [i in (0, 3, 6) for i in range(8)]
    assert weights[0] != list(WEIGHTS.values())


def test_measuring_changes_neither_dropout_nor_order(configured, tmp_path):
    """With one loss its weight stays what it was, so a balanced run is bitwise the plain one."""
    lora = {"tune": "lora", "lora": {"r": 4, "dropout": 0.1, "target_modules": ["q_proj", "up_proj"]}}
    stage = {"weights": {"kl": 1, "ce": 0}}
    train_stage(configured(stage=stage, out=str(tmp_path / "plain"), **lora), 1, quiet=True)
    train_stage(configured(stage={**stage, "balance": True, "balance_every": 2}, **lora), 1, quiet=True)
    ours, plain = ([line["losses"] for line in logged(tmp_path / name, "train")] for name in ("run", "plain"))
    assert ours == plain


@pytest.mark.parametrize("balance", [False, "loss"])
def test_norms_to_look_at_change_nothing_of_what_is_learned(configured, tmp_path, balance):
    stage = {**BALANCED, "balance": balance, "shares": {"general": 1, "medical": 1}}
    train_stage(configured(stage=stage, out=str(tmp_path / "blind"), **LORA), 1, quiet=True)
    train_stage(configured(stage={**stage, "norms_every": 4}, **LORA), 1, quiet=True)
    ours, theirs = logged(tmp_path / "run", "train"), logged(tmp_path / "blind", "train")
    assert [line["losses"] for line in ours] == [line["losses"] for line in theirs]
    names = {*WEIGHTS, "domain/general", "domain/medical"}
    assert [set(line["gradient_norms"]) for line in ours if line["step"] in (1, 5)] == [names, names]
    assert all(value > 0 for value in ours[4]["gradient_norms"].values())
    assert all("gradient_norms" in line for line in theirs if balance and line["step"] in (1, 4, 7))
    assert not any("gradient_norms" in line for line in theirs if not balance)
