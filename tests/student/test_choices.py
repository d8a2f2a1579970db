"""Protects multiple choice: the right tokens are scored, equal to dense float64 log-probabilities, and every bad row
is refused."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from distill.__main__ import app
from distill.data.chat import ChatTemplate
from distill.errors import DataError, UsageError
from distill.student.choices import (
    ChoiceFigures,
    ChoiceQuestion,
    Scored,
    read_questions,
    score_choices,
    scored_choice,
    sums_of_logprobs,
)
from distill.student.evaluate import Subject

TEMPLATE = (
    "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }} w9 {% endfor %}"
    "{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world.student)


@pytest.fixture
def student(configured):
    return Subject.load(configured(), reader=None).student


def dense(folder, ids, targets):
    """Σ log p by the book."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs_NV = model(torch.tensor([ids])).logits[0, :, :300].double().log_softmax(1)
    return sum(float(logprobs_NV[t, ids[t + 1]]) for t in targets)


@pytest.mark.parametrize("token_budget", [16, 4096])
def test_sums_equal_the_dense_reference(student, world, token_budget):
    rng = np.random.default_rng(0)
    sequences = [
        Scored(input_ids=tuple(rng.integers(2, 300, length).tolist()), targets=tuple(range(first, length - 1)))
        for length, first in ((9, 0), (4, 2), (12, 5), (3, 1))
    ]
    sums = sums_of_logprobs(student, sequences, token_budget=token_budget, head_chunk=5)
    assert sums == pytest.approx([dense(world.student, s.input_ids, s.targets) for s in sequences], rel=1e-5)


def test_the_words_of_the_choice_are_scored_and_nothing_else(tokenizer):
    plain = scored_choice("w3 w4", "w5 w6", tokenizer, None)
    assert (plain.input_ids, plain.targets) == ((5, 6, 7, 8), (1, 2))
    tokenizer.chat_template = TEMPLATE
    chat = scored_choice("w3 w4", "w5 w6", tokenizer, ChatTemplate(tokenizer))
    tokenizer.chat_template = None
    words = tokenizer.convert_ids_to_tokens(chat.input_ids)
    assert words == ["w1", "w3", "w4", "w9", "w2", "w5", "w6", "w9"]
    assert [words[t + 1] for t in chat.targets] == ["w5", "w6"]


def test_the_likeliest_choice_wins_plainly_and_by_length(student, tokenizer, world):
    question = ChoiceQuestion(question="w3 w4", choices=("w5", "w77 w78 w100", "w8 w9"), answer=0)
    scored = [scored_choice(question.question, choice, tokenizer, None) for choice in question.choices]
    sums = [dense(world.student, item.input_ids, item.targets) for item in scored]
    lengths = [len(choice) for choice in question.choices]
    best, best_by_length = int(np.argmax(sums)), int(np.argmax(np.array(sums) / lengths))
    assert best != best_by_length  # the two rules can be told apart here
    for answer, plain, normalised in ((best, 1, 0), (best_by_length, 0, 1)):
        asked = [ChoiceQuestion(question=question.question, choices=question.choices, answer=answer)]
        result = score_choices(student, tokenizer, asked, token_budget=99, head_chunk=5)
        assert (result.plain.accuracy, result.normalised.accuracy) == (plain, normalised)


def test_macro_figures_by_hand():
    """Place 0: 2 asked, 1 found of 2 said. Place 1: 2 asked, 1 found of 1. Place 3: never asked, said once."""
    figures = ChoiceFigures.of([0, 0, 1, 1], [0, 3, 1, 0])
    assert figures.num_questions == 4
    assert figures.accuracy == 0.5
    assert figures.precision == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert figures.recall == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert figures.f1 == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)


def write_csv(path, header, *rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_lists_letters_and_numbers_are_read(tmp_path):
    lines = [
        {"question": "q", "choices": ["x", "y"], "answer": 1},
        {"question": "q", "choices": ["x", 0.5, 3, 10**400], "answer": "c"},
        {"question": "q", "A": "x", "B": "y", "answer": "0"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [(q.choices, q.answer) for q in read_questions(path)] == [
        (("x", "y"), 1),
        (("x", "0.5", "3", "1" + 400 * "0"), 2),
        (("x", "y"), 0),
    ]
    path = write_csv(tmp_path / "q.csv", ["question", "A", "B", "C", "answer"], ["q", "x", "y", "", "B"])
    assert [(q.choices, q.answer) for q in read_questions(path)] == [(("x", "y"), 1)]


BAD = {
    "no question": {"choices": ["x", "y"], "answer": 0},
    "one choice": {"question": "q", "choices": ["x"], "answer": 0},
    "no choices": {"question": "q", "answer": 0},
    "a null among the choices": {"question": "q", "choices": ["x", None], "answer": 0},
    "a choice of parts": {"question": "q", "choices": ["x", {"text": "y"}], "answer": 0},
    "a choice of parts in a column": {"question": "q", "A": "x", "B": ["y"], "answer": 0},
    "a choice that may be true or True": {"question": "q", "choices": [True, False], "answer": 0},
    "an empty choice": {"question": "q", "choices": ["x", " "], "answer": 0},
    "a gap": {"question": "q", "A": "x", "C": "y", "answer": "A"},
    "an answer too high": {"question": "q", "choices": ["x", "y"], "answer": 2},
    "an answer below": {"question": "q", "choices": ["x", "y"], "answer": -1},
    "no answer": {"question": "q", "choices": ["x", "y"]},
    "words as the answer": {"question": "q", "choices": ["x", "y"], "answer": "BA"},
}


@pytest.mark.parametrize("bad", BAD)
def test_a_row_that_is_no_question_is_refused_with_its_number(bad, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "q", "choices": ["x", "y"], "answer": 0}) + "\n" + json.dumps(BAD[bad]))
    with pytest.raises(DataError, match=r"q\.jsonl, row 2: "):
        read_questions(path)


@pytest.mark.parametrize(
    ("choices", "shown"), [(["x", None], "null"), ([1.5, float("nan")], "NaN"), ([1.5, float("inf")], "Infinity")]
)
def test_a_value_of_parquet_that_is_no_choice(tmp_path, choices, shown):
    rows = [{"question": "q", "choices": some, "answer": 0} for some in ([choices[0], choices[0]], choices)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    with pytest.raises(DataError, match=f"row 1: one of its choices is {shown}, which is neither text nor a number"):
        read_questions(tmp_path / "q.parquet")


def test_files_that_hold_no_questions(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no question"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(UsageError, match="--choices"):
        read_questions(tmp_path / "q.txt")
    with pytest.raises(UsageError, match="--choices"):
        read_questions(tmp_path / "missing.csv")


def test_the_command_needs_no_cache(world, tmp_path):
    path = write_csv(
        tmp_path / "q.csv", ["question", "A", "B", "answer"], ["w3", "w4", "w5 w6", "A"], ["w7", "w8", "w9", "B"]
    )
    common = ["eval", "--student", str(world.student), "--choices", str(path), "--set", "device=cpu"]

    def run(*more):
        done = CliRunner().invoke(app, [*common, *more], env={"COLUMNS": "120"}, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    result = json.loads(run("--json"))
    assert set(result) == {"student", "choices"}
    assert result["choices"][str(path)]["plain"]["num_questions"] == 2
    both = json.loads(run("--json", "--cache", str(world.cache)))
    assert both["choices"] == result["choices"]
    assert both["overall"]["num_tokens"] > 0
    text = run()
    assert "by length" in text
    assert "held out" not in text
