"""The caches that the tests of the cache fill, for reports to look at."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.cache import tensors
from tests.cache import conftest as cache_fixtures

teacher = cache_fixtures.teacher
plan = cache_fixtures.plan
filler = cache_fixtures.filler
make_teacher = cache_fixtures.make_teacher_fixture
plan_of = cache_fixtures.plan_of_fixture
fill = cache_fixtures.fill_fixture
NUM_POSITIONS = 50


def tokenizer_json(vocab_size: int) -> bytes:
    """A tokenizer whose token 7 reads "w7"."""
    vocab = {f"w{number}": number for number in range(vocab_size)}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    }
    return json.dumps(content).encode()


def fidelity_bytes(teacher: Any) -> bytes:
    """What a teacher's job leaves of some held-out positions."""
    hidden = teacher.hidden(np.random.default_rng(77), NUM_POSITIONS)
    targets = teacher.targets(hidden)
    arrays = {name: getattr(targets, name) for name in ("topk_ids", "topk_logprobs", "log_z", "log_tail", "entropy")}
    arrays |= {f"hidden_{bits}": values for bits, values in targets.hidden.items()}
    return tensors.dump({**arrays, "logprobs": teacher.logprobs(hidden).astype(np.float16)}, {})


@pytest.fixture
def cache(tmp_path: Path, teacher: Any, plan: Any) -> Path:
    """A sealed cache with fidelity positions and a tokenizer."""
    root = tmp_path / "cache"
    writer = cache_fixtures.CacheWriter.open(root, plan)
    writer.put_once("fidelity.safetensors", fidelity_bytes(teacher))
    writer.put_once("teacher/tokenizer.json", tokenizer_json(200))
    cache_fixtures.fill(root, teacher, plan)
    return root
