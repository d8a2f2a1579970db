"""Every command of docs/ten-questions.md runs as it stands, and its answers are right on a cache that is known."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from distill.__main__ import app
from distill.cache.reader import CacheReader
from distill.records import SequenceTargets
from tests.docs.caches import filled_cache

TEXT = (Path(__file__).parents[2] / "docs" / "ten-questions.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder's ``cache``."""
    filled_cache(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def sequences(cache: Path) -> list[SequenceTargets]:
    reader = CacheReader.open(cache)
    return [row for commit in reader.commits for split in ("train", "eval") for row in reader.sequences(commit, split)]


def answer(question: int) -> list[dict[str, Any]]:
    arguments = shlex.split(COMMANDS[question - 1])
    assert arguments[:2] == ["distill", "sql"]
    done = CliRunner().invoke(app, [*arguments[1:], "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


@pytest.mark.usefixtures("cache")
def test_there_are_ten_and_all_of_them_are_answered() -> None:
    assert len(COMMANDS) == len(re.findall(r"^## \d+\.", TEXT, flags=re.MULTILINE)) == 10
    for question in range(1, 11):
        rows = answer(question)
        assert rows or question in (4, 8), question


def test_the_answers_are_right(cache: Path) -> None:
    rows = sequences(cache)
    trained = [row.prompt.loss_mask for row in rows]
    assert sum(row["trained"] for row in answer(1)) == sum(mask.sum() for mask in trained)
    most = max(row.targets.entropy[mask].max() for row, mask in zip(rows, trained, strict=True))
    assert answer(2)[0]["entropy"] == pytest.approx(float(most))
    departments = {row["department"]: row["sequences"] for row in answer(3)}
    assert departments["cardiology"] == sum("department" in row.prompt.metadata for row in rows)
    for got in answer(5):
        of_domain = [row for row in rows if row.prompt.domain == got["domain"]]
        first = [(r.targets.topk_ids[:, 0] == r.prompt.input_ids[1:])[r.prompt.loss_mask] for r in of_domain]
        inside = [(r.targets.topk_ids == r.prompt.input_ids[1:, None]).any(1)[r.prompt.loss_mask] for r in of_domain]
        assert got["agrees"] == pytest.approx(np.concatenate(first).mean())
        assert got["outside"] == pytest.approx(1 - np.concatenate(inside).mean())
    assert [row["cut"] for row in answer(9)] == [0, 0]
    assert answer(10) == [{"domain": "general", "why": "no answer", "rejected": 1, "first": "general.jsonl:0"}]


def test_the_least_likely_answer_is_found(cache: Path) -> None:
    def likelihood(row: SequenceTargets) -> float:
        hit = row.targets.topk_ids == row.prompt.input_ids[1:, None]
        found = np.where(hit, row.targets.topk_logprobs, -np.inf).max(axis=1)
        values = np.where(np.isfinite(found), found, row.targets.topk_logprobs[:, -1])
        return float(values[row.prompt.loss_mask].mean())

    worst = min(sequences(cache), key=likelihood)
    got = answer(6)[0]
    assert got["source"] == worst.prompt.source
    assert got["logprob"] == pytest.approx(likelihood(worst), abs=1e-5)
