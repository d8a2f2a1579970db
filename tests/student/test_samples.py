"""Protects the samples: the student's own greedy words beside the teacher's or the data's, the same for each run."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.cache.reader import CacheReader
from distill.cache.samples import SAMPLES_FILE, Sample, render_samples
from distill.student.model import Origin, load_student
from distill.student.precision import resolve_precision
from distill.student.samples import answers_table, greedy, questions_of, sample_of
from distill.student.trainer import train_stage
from tests.conftest import row_of
from tests.student.conftest import VOCAB, build_cache, save_model


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world.teacher)


@pytest.fixture(scope="module")
def sampled_cache(world, tmp_path_factory):
    """A sealed cache in which the teacher answered one medical prompt; with words of its own that tell it apart."""
    teacher = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32)
    root = tmp_path_factory.mktemp("sampled") / "cache"
    sample = Sample(
        prompt_id="p", domain="medical", prompt="why", input_ids=(5, 6), response="because", response_ids=(7, 8)
    )
    return build_cache(root, teacher, files={SAMPLES_FILE: render_samples([sample])})


def test_the_last_answer_of_a_conversation_is_the_reference(tokenizer):
    sample = sample_of(row_of([0, 1, 1, 0, 0, 1, 1, 0], prompt="Q", response="A"), tokenizer)
    assert sample.input_ids == (100, 101, 102, 103, 104, 105)  # target 5 is token 6
    assert sample.response_ids == (106, 107)
    assert (sample.prompt, sample.response) == ("Q", "A")


def test_a_plain_text_is_cut_in_two(tokenizer):
    short = sample_of(row_of([1, 1, 1, 1, 1]), tokenizer)
    assert (short.input_ids, short.response_ids) == ((100, 101, 102), (103, 104, 105))
    assert (short.prompt, short.response) == ("w98 w99 w100", "w101 w102 w103")
    assert len(sample_of(row_of([1] * 99), tokenizer).input_ids) == 32
    assert sample_of(row_of([1]), tokenizer).response_ids == (101,)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_greedy_equals_the_models_own_likeliest_tokens(configured, tmp_path, tune):
    """Step by step without a key-value cache, over real ids only."""
    save_model(tmp_path / "student", seed=3, initializer_range=0.4, tie_word_embeddings=False)
    student = load_student(
        configured(tune=tune),
        Origin(base=str(tmp_path / "student")),
        precision=resolve_precision("cpu", "fp32"),
        vocab_size=VOCAB,
        training=True,
    )
    student.model.eval()
    ids = torch.tensor([[4, 9, 2]])
    for _ in range(9):
        with torch.no_grad():
            ids = torch.cat([ids, student.model(ids).logits[:, -1:, :VOCAB].argmax(-1)], 1)
    wanted = tuple(ids[0, 3:].tolist())
    assert greedy(student, (4, 9, 2), num_tokens=9, stop_ids=()) == wanted
    assert len(set(wanted)) > 2
    stop = wanted[3]
    cut = wanted[: wanted.index(stop) + 1]
    assert greedy(student, (4, 9, 2), num_tokens=9, stop_ids={stop}) == cut


def test_padded_rows_of_the_head_are_never_said(configured, tmp_path):
    model = save_model(tmp_path / "student", seed=1, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 50 * model.lm_head.weight[:1].sign()
    model.save_pretrained(tmp_path / "student")
    student = load_student(
        configured(),
        Origin(base=str(tmp_path / "student")),
        precision=resolve_precision("cpu", "fp32"),
        vocab_size=VOCAB,
        training=False,
    )
    assert max(greedy(student, (4,), num_tokens=12, stop_ids=())) < VOCAB


def test_the_teachers_answers_come_first_then_held_out_rows(world, sampled_cache, tokenizer):
    domains = ("general", "medical")
    questions = questions_of(CacheReader.open(sampled_cache), domains, num=2, tokenizer=tokenizer)
    assert [(q.sample.domain, q.author) for q in questions] == [
        ("general", "data"),
        ("general", "data"),
        ("medical", "teacher"),
    ]
    assert questions[2].sample.response == "because"
    assert len(questions[0].sample.input_ids) == 8  # the prompt of every row, see build_cache
    assert questions_of(CacheReader.open(world.cache), domains, num=0, tokenizer=tokenizer) == []


def read(run):
    return [json.loads(line) for line in (run / "stage1" / "samples.jsonl").read_text().splitlines()]


def test_each_evaluation_writes_and_shows_the_answers(configured, tmp_path, sampled_cache, capsys):
    """And asking changes nothing of what is learned."""
    shares = {"shares": {"general": 1, "medical": 1}, "learning_rate": 1e-2}
    settings = {"cache": str(sampled_cache), "stage": shares}
    train_stage(configured(**settings, samples=1, sample_tokens=5), 1)
    rows = read(tmp_path / "run")
    assert [(row["step"], row["domain"], row["author"]) for row in rows] == [
        (step, domain, author) for step in (0, 4, 8) for domain, author in (("general", "data"), ("medical", "teacher"))
    ]
    assert all(row["num_tokens"] == 5 and len(row["student"].split()) == 5 for row in rows)
    assert rows[1]["student"] != rows[3]["student"]  # it learned something
    shown = capsys.readouterr().err
    assert "stage 1, step 8" in shown
    assert "(teacher) because" in shown
    asked = (tmp_path / "run" / "stage1" / "last" / "state.json").read_text()
    train_stage(configured(**settings, out=str(tmp_path / "silent")), 1, quiet=True)
    silent = json.loads((tmp_path / "silent" / "stage1" / "last" / "state.json").read_text())
    assert json.loads(asked)["evaluation"] == silent["evaluation"]
    assert not (tmp_path / "silent" / "stage1" / "samples.jsonl").exists()


def test_what_a_cache_holds_is_no_markup_and_no_command(capsys):
    from rich.console import Console

    from distill.student.samples import Answer

    answer = Answer(
        domain="[red]d",
        prompt_id="p",
        prompt="a\x1b[2Jb\nc",
        student="x" * 999,
        reference="r",
        author="data",
        num_tokens=1,
        num_same=0,
    )
    Console(width=80).print(answers_table([answer], "t"))
    shown = capsys.readouterr().out
    assert "[red]d" in shown
    assert "\x1b" not in shown
    assert shown.count("x") < 200
