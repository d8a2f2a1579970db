"""Protects the promise that a student whose ids mean other tokens is refused before any weight is read."""

import json
import time

import pytest

from distill.cache.reader import CacheReader
from distill.errors import IdentityError, UsageError
from distill.student.tokenizer import matching_tokenizer
from distill.student.trainer import train_stage


@pytest.fixture
def swapped(world, tmp_path):
    """The student's tokenizer with two words exchanged: the size is the same."""
    folder = tmp_path / "swapped"
    folder.mkdir()
    for path in world.student.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]
    path.write_text(json.dumps(content))
    return folder


def test_the_same_map_is_accepted(world):
    tokenizer = matching_tokenizer(str(world.student), CacheReader.open(world.cache), trust_remote_code=False)
    assert tokenizer.convert_tokens_to_ids("w7") == 9


def test_another_map_of_the_same_size_is_refused_and_explained(world, swapped):
    with pytest.raises(IdentityError) as caught:
        matching_tokenizer(str(swapped), CacheReader.open(world.cache), trust_remote_code=False)
    message = str(caught.value)
    assert "300 tokens, the teacher's 300" in message
    assert "2 tokens have another id ('w7' is 9 there, 10 here" in message
    assert "size proves nothing" in message
    assert caught.value.exit_code == 4


def test_the_refusal_comes_in_seconds_and_before_a_model(configured, swapped):
    """The folder has no weights at all, so reading any would fail otherwise."""
    assert not list(swapped.glob("*.safetensors"))
    before = time.monotonic()
    with pytest.raises(IdentityError, match="token -> id map"):
        train_stage(configured(student=str(swapped)), 1, quiet=True)
    assert time.monotonic() - before < 5


def test_a_missing_tokenizer_is_a_usage_error(world, tmp_path):
    with pytest.raises(UsageError, match="tokenizer"):
        matching_tokenizer(str(tmp_path), CacheReader.open(world.cache), trust_remote_code=False)
