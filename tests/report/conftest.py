"""The caches that the tests of the cache fill, and a run's files, for reports to look at."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.cache import tensors
from distill.records import Reject
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


@pytest.fixture
def rejecting_cache(tmp_path: Path, teacher: Any, plan_of: Callable[..., Any], fill: Callable[..., Any]) -> Path:
    """A sealed cache with hostile names and three rejects of two reasons."""
    plan = plan_of(teacher, rows={"general": 4, "<b>$x_1$ 医学</b>": 4})
    root = tmp_path / "rejecting"
    writer = fill(root, teacher, plan, num_units=1)
    unit = plan.units[1]
    reasons = ("row has 3,001 tokens", "row has 17 tokens", "no <script>answer</script>")
    rejects = [Reject(domain=unit.domain, source=f"m.jsonl:{i}", reason=text) for i, text in enumerate(reasons)]
    rows = [teacher.sequence(3, domain=unit.domain, source="m.jsonl:3")]
    writer.commit(unit, rows, rejects=rejects, num_input_rows=4)
    writer.seal()
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three stages of four steps with two evaluations each, the last line of the last torn."""
    root = tmp_path / "run"
    for number, temperature in ((1, 4.0), (2, 2.0), (3, 1.0)):
        folder = root / f"stage{number}"
        folder.mkdir(parents=True)
        lines = [evaluation(0, temperature), *(step(i, number) for i in range(1, 5)), evaluation(4, temperature)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "tokens.json").write_text(json.dumps(record(4)))
    with (root / "stage3" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    return root


def record(step: int) -> dict[str, Any]:
    """A hostile sequence of four tokens; the student's first choice for the second is not the teacher's."""
    choices = [[7, " yes", 0.5], [8, "</script><b>no</b>", 0.25]]
    teacher = {"choices": choices, "rest": 0.25, "tail": 0.125}
    student = {"choices": [[8, "</script><b>no</b>", 0.75], [7, " yes", 0.125]], "rest": 0.125}
    tokens = [
        {"id": 1, "text": "<i>", "trained": False},
        {"id": 7, "text": " yes", "trained": True, "teacher": teacher, "student": student},
        {
            "id": 8,
            "text": "</script><b>no</b>",
            "trained": True,
            "teacher": teacher,
            "student": teacher | {"tail": None},
        },
        {"id": 9, "text": "\n医", "trained": False, "teacher": teacher, "student": student},
    ]
    return {"step": step, "sequences": [{"domain": "medical", "source": "m.jsonl:5", "before": 0, "tokens": tokens}]}


def evaluation(step: int, temperature: float) -> dict[str, Any]:
    kl = {str(T): 2.0 / (1 + step) for T in {temperature, 1.0}}
    bins = [
        {"num_tokens": 3, "confidence": 0.2, "accuracy": 0.3},
        {"num_tokens": 1, "confidence": 0.9, "accuracy": 0.5},
    ]
    figures = {"kl": kl, "ce": 3.0 - step / 10, "top1_agreement": 0.25 + step / 100, "feature": None}
    figures |= {"perplexity": 20.0, "top5_agreement": 0.5, "ece": 0.175, "contrastive": 0.5, "calibration": bins}
    domains = {"general": figures, "medical": figures}
    return {"kind": "eval", "step": step, "time": 1.0, "objective": 1.0, "domains": domains, "overall": figures}


def step(number: int, stage: int) -> dict[str, Any]:
    shares = {domain: {"realised": 0.5, "scheduled": 0.4} for domain in ("general", "medical")}
    losses = {"total": 2.0 / number, "kl": 1.0, "ce": 3.0} | ({"feature": 0.5} if stage == 2 else {})
    return {"kind": "train", "step": number, "losses": losses, "lr": 1e-4, "grad_norm": None, "tokens": 100} | (
        {"shares": shares, "grad_norm": 1.5} if number > 1 else {}
    )
