"""Protects what people are shown of single tokens: the right target beside each, masses that add up to 1."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from distill.cache.views import NUM_CHOICES, Record, expected_of, view_of, window_of, with_student
from tests.conftest import row_of


def decode(ids):
    return " ".join(f"w{number}" for number in ids)


def test_each_token_has_the_target_that_describes_it():
    row = row_of([0, 0, 1, 1, 1])
    view = view_of(row, window_of(row, num_tokens=99), decode)
    assert [token.text for token in view.tokens] == [f"w{100 + i}" for i in range(6)]
    assert [token.trained for token in view.tokens] == [False, False, False, True, True, True]
    assert view.tokens[0].teacher is None
    for token in view.tokens[1:]:
        assert token.teacher.choices[0] == (token.id, token.text, 0.5)
        assert len(token.teacher.choices) == NUM_CHOICES
        assert token.teacher.rest == pytest.approx(1 - 0.5 - 9 * 0.02)
        assert token.teacher.tail == pytest.approx(0.2)  # outside the top-16


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=90), st.integers(2, 70), st.integers(2, 95))
def test_a_window_holds_the_first_trained_token_where_the_cut_leaves_it(mask, num_tokens, max_length):
    row = row_of(mask)
    window = window_of(row, num_tokens=num_tokens, max_length=max_length)
    length = min(len(mask) + 1, max_length)
    assert 0 <= window.start < window.stop <= length
    assert window.stop - window.start == min(num_tokens, length)
    if True in mask[: length - 1]:
        assert window.start <= mask.index(True) + 1 < window.stop
    view = view_of(row, window, decode)
    assert [token.teacher is None for token in view.tokens].count(False) == len(window.positions)
    assert view.before == window.start


def test_a_students_expectations_come_to_the_tokens_that_have_a_target():
    row = row_of([1, 1, 1])
    expected = [expected_of([place], [0.25], decode) for place in (1, 2, 3)]
    view = with_student(view_of(row, window_of(row, num_tokens=9), decode), expected)
    assert view.tokens[0].student is None
    assert [token.student.choices[0][1] for token in view.tokens[1:]] == ["w1", "w2", "w3"]
    assert view.tokens[1].student.rest == 0.75
    assert view.tokens[1].student.tail is None


def test_a_record_comes_back_and_further_keys_are_refused():
    row = row_of([1, 1])
    record = Record(step=7, sequences=(view_of(row, window_of(row, num_tokens=9), decode),))
    adapter = TypeAdapter(Record)
    data = adapter.dump_json(record)
    assert adapter.validate_json(data) == record
    with pytest.raises(ValidationError):
        adapter.validate_json(data.replace(b'"step"', b'"other"'))


def test_probabilities_that_round_above_one_leave_no_negative_rest():
    row = row_of([1])
    targets = replace(row.targets, topk_logprobs=row.targets.topk_logprobs + np.float32(0.3))
    view = view_of(replace(row, targets=targets), window_of(row, num_tokens=9), decode)
    assert view.tokens[1].teacher.tail == 0
