"""No row with numbers that cannot be right is stored, and each reason can be read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distill.cache.sanity import problem
from distill.cache.schema import Layout
from distill.records import SequenceTargets


def judge(teacher: Any, identity_of: Any, row: SequenceTargets) -> str | None:
    identity = identity_of(teacher)
    return problem(row, identity=identity, layout=Layout.of(identity, teacher.projection.widths))


def with_targets(row: SequenceTargets, **changes: Any) -> SequenceTargets:
    return dataclasses.replace(row, targets=dataclasses.replace(row.targets, **changes))


def with_prompt(row: SequenceTargets, **changes: Any) -> SequenceTargets:
    return dataclasses.replace(row, prompt=dataclasses.replace(row.prompt, **changes))


def poked(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    copy = array.copy()
    copy[index] = value
    return copy


def test_a_real_row_is_sane(teacher: Any, identity_of: Any) -> None:
    for seed in range(20):
        assert judge(teacher, identity_of, teacher.sequence(seed)) is None


Damage = Callable[[SequenceTargets], SequenceTargets]
DAMAGES: dict[str, Damage] = {
    "NaN or infinity in topk_logprobs": lambda r: with_targets(
        r, topk_logprobs=poked(r.targets.topk_logprobs, (3, 7), np.nan)
    ),
    "NaN or infinity in log_z": lambda r: with_targets(r, log_z=poked(r.targets.log_z, (0, 1), np.inf)),
    "NaN or infinity in log_tail": lambda r: with_targets(r, log_tail=poked(r.targets.log_tail, (0, 1), -np.inf)),
    "NaN or infinity in entropy": lambda r: with_targets(r, entropy=poked(r.targets.entropy, (2,), np.nan)),
    "topk_ids outside the vocabulary of 200": lambda r: with_targets(
        r, topk_ids=poked(r.targets.topk_ids, (2, 2), 200)
    ),
    "input_ids outside the vocabulary of 200": lambda r: with_prompt(r, input_ids=poked(r.prompt.input_ids, (2,), -1)),
    "topk_logprobs that are not sorted": lambda r: with_targets(r, topk_logprobs=r.targets.topk_logprobs[:, ::-1]),
    "topk_logprobs above 0": lambda r: with_targets(r, topk_logprobs=poked(r.targets.topk_logprobs, (0, 0), 0.5)),
    "log_tail above 0": lambda r: with_targets(r, log_tail=poked(r.targets.log_tail, (0, 0), 0.5)),
    "entropy below 0": lambda r: with_targets(r, entropy=poked(r.targets.entropy, (0,), -1)),
    "hidden_2 outside 2 bits": lambda r: with_targets(
        r, hidden={**r.targets.hidden, 2: poked(r.targets.hidden[2], (0, 0), 2)}
    ),
    "the same id twice": lambda r: with_targets(
        r, topk_ids=poked(r.targets.topk_ids, (1, 5), r.targets.topk_ids[1, 0])
    ),
    "hidden states of [] bits": lambda r: with_targets(r, hidden={}),
    "log_z of shape (11, 2), not (11, 3)": lambda r: with_targets(r, log_z=r.targets.log_z[:, :2]),
    "loss_mask of shape (12,), not (11,)": lambda r: with_prompt(r, loss_mask=np.ones(12, bool)),
    "text that is not valid Unicode": lambda r: with_prompt(r, response="\ud800"),
    "sum to 1": lambda r: with_targets(r, topk_logprobs=r.targets.topk_logprobs - 1),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damage_is_named(teacher: Any, identity_of: Any, reason: str) -> None:
    found = judge(teacher, identity_of, DAMAGES[reason](teacher.sequence(1)))
    assert found is not None
    assert reason in found


def test_targets_shifted_by_one_position_do_not_fit_together(teacher: Any, identity_of: Any) -> None:
    row = teacher.sequence(1)
    stale = with_targets(row, log_z=np.roll(row.targets.log_z, 1, axis=0))
    found = judge(teacher, identity_of, stale)
    assert found is not None
    assert "top-k and tail that sum to 1 ±" in found


def test_too_long_a_row_is_refused(teacher: Any, identity_of: Any) -> None:
    assert judge(teacher, identity_of, teacher.sequence(1, length=65)) == "65 tokens, not 2 to 64"


def test_sampled_ids_and_inner_layers_are_looked_at(teacher: Any, identity_of: Any) -> None:
    identity = identity_of(teacher, num_samples=2, layers=(3,), layer_bytes=4)
    layout = Layout.of(identity, teacher.projection.widths)
    plain = teacher.sequence(1)
    num = plain.prompt.num_targets
    ids, counts = np.arange(2 * num, dtype=np.int32) % 2, np.ones(2 * num, np.int16)
    layers = {"layer3_hidden": np.zeros((num, 4), np.int8)}
    row = with_targets(plain, sampled_ids=ids, sampled_counts=counts, layers=layers)
    assert problem(row, identity=identity, layout=layout) is None
    for changes, says in [
        ({"sampled_ids": None, "sampled_counts": None}, "no sampled ids"),
        ({"layers": {}}, "inner layers"),
        ({"layers": {"layer3_hidden": np.zeros((num, 5), np.int8)}}, "layer3_hidden of shape"),
        ({"sampled_counts": poked(counts, (3,), 2)}, "not 2 at each position"),
        ({"sampled_ids": poked(ids, (3,), 200)}, "sampled_ids outside"),
        ({"sampled_ids": ids[:-1]}, "counts"),
    ]:
        assert says in str(problem(with_targets(row, **changes), identity=identity, layout=layout)), says
    assert problem(row, identity=identity_of(teacher), layout=Layout.of(identity_of(teacher), layout.widths))
