"""Protects the record of single tokens that a run leaves: the student's true distribution beside the teacher's."""

import json

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from distill.cache.reader import CacheReader
from distill.cache.views import NUM_CHOICES, Record, held_out_rows
from distill.student.spotlight import TOKENS_FILE
from distill.student.trainer import train_stage
from tests.student.conftest import LENGTH, VOCAB


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_run_leaves_the_students_distributions_at_its_last_step(configured, world, tmp_path, tune):
    stage = {"shares": {"general": 1, "medical": 1}, "learning_rate": 1e-2}
    train_stage(configured(stage=stage, samples=2, sample_tokens=12, tune=tune), 1, quiet=True)
    folder = tmp_path / "run" / "stage1"
    record = TypeAdapter(Record).validate_json((folder / TOKENS_FILE).read_bytes())
    assert record.step == 8
    assert [view.domain for view in record.sequences] == ["general", "general", "medical", "medical"]
    reader = CacheReader.open(world.cache)
    row = next(held_out_rows(reader, "medical"))
    view = record.sequences[2]
    assert view.source == row.prompt.source
    assert view.before == 5  # the first trained token is the eighth: a quarter of the window stands before it
    assert [token.trained for token in view.tokens] == [False] * 3 + [True] * 9
    if tune == "lora":
        return
    model = AutoModelForCausalLM.from_pretrained(folder / "last" / "model", dtype=torch.float32)
    ids = torch.from_numpy(row.prompt.input_ids.astype("int64"))[None]
    with torch.no_grad():
        probabilities_NV = model(ids).logits[0, :, :VOCAB].softmax(1)
    for place, token in enumerate(view.tokens, view.before):
        wanted = probabilities_NV[place - 1].topk(NUM_CHOICES)
        assert [p for *_, p in token.student.choices] == pytest.approx(wanted.values.tolist(), rel=2e-3)
        assert [token_id for token_id, *_ in token.student.choices] == wanted.indices.tolist()
        assert token.student.rest == pytest.approx(1 - float(wanted.values.sum()), abs=1e-3)
        first = int(row.targets.topk_ids[place - 1][0])
        assert token.teacher.choices[0][:2] == (first, f"w{first - 2}")


def test_a_sequences_first_token_has_nobody_who_expected_it(configured, tmp_path):
    train_stage(configured(samples=1, sample_tokens=64, max_length=20), 1, quiet=True)
    data = json.loads((tmp_path / "run" / "stage1" / TOKENS_FILE).read_bytes())
    tokens = data["sequences"][0]["tokens"]
    assert len(tokens) == 20 < LENGTH
    assert tokens[0]["teacher"] is tokens[0]["student"] is None
    assert all(token["student"] for token in tokens[1:])


def test_a_run_that_asks_nothing_leaves_no_record(configured, tmp_path):
    train_stage(configured(samples=0), 1, quiet=True)
    assert not (tmp_path / "run" / "stage1" / TOKENS_FILE).exists()
