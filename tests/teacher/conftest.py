"""Data of exact lengths for a real tokenizer, and the command line as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distill.cache.reader import CacheReader
from distill.cache.storage import Root
from distill.records import SequenceTargets

CHUNK = 64  # tokens in one step of the engine, so that longer prompts are prefilled in pieces


def text_of(tokenizer: object, num_tokens: int, *, seed: int) -> str:
    """A text that the tokenizer turns into exactly ``num_tokens`` tokens."""
    words = ["river", "stone", "7", "温度", "light", "def f(x):", "heart", "sugar", "\n", "north", "医生", "salt"]
    pieces = [words[(seed + 5 * i + i * i) % len(words)] for i in range(4 * num_tokens)]
    ids = tokenizer(" ".join(pieces))["input_ids"]  # type: ignore[operator]
    for start in range(len(ids) - num_tokens):
        text = tokenizer.decode(ids[start : start + num_tokens])  # type: ignore[attr-defined]
        if len(tokenizer(text)["input_ids"]) == num_tokens:  # type: ignore[operator]
            return str(text)
    raise AssertionError("no such text")


@pytest.fixture(scope="session")
def data_files(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain texts whose L-1 targets are 1, below, at and above CHUNK, and question-answer rows."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    folder = tmp_path_factory.mktemp("data")
    lengths = [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 150, 200, 40, 41, 42, 43, 44]
    texts = [{"text": text_of(tokenizer, n, seed=i)} for i, n in enumerate(lengths)]
    rows = [
        {"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}, 也就是 {2 * i}。", "department": f"d{i % 3}"}
        for i in range(12)
    ]
    rows[4]["answer"] = ""
    files = {"texts": folder / "texts.jsonl", "questions": folder / "questions.jsonl", "held": folder / "held.jsonl"}
    for name, content in (("texts", texts), ("questions", rows[:9]), ("held", rows[9:])):
        lines = [json.dumps(row, ensure_ascii=False) for row in content]
        files[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    with files["questions"].open("a", encoding="utf-8") as file:
        file.write('{"question": "broken\n')
    return files


def write_sums(path: Path, num_rows: int) -> Path:
    """A file of so many short questions and answers, no two alike."""
    lines = [json.dumps({"ask": f"What is {i}?", "answer": f"{i} it is, {i} times."}) for i in range(num_rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_by_source(root: Root) -> dict[str, SequenceTargets]:
    """All rows of a cache; none may be there twice."""
    cache = CacheReader.open(str(root))
    found = [row for item in cache.commits for split in ("train", "eval") for row in cache.sequences(item, split)]
    by_source = {row.prompt.source: row for row in found}
    assert len(by_source) == len(found)
    return by_source


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``python -m distill …`` in a process of its own."""
    command = [sys.executable, "-m", "distill", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
