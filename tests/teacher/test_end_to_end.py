"""The real engines, from the command line to Parquet, against a forward pass of the same weights in transformers.

What it protects: the shift between positions and targets, chunked prefill, masks, and every captured number.
"""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.cache.reader import CacheReader
from tests.teacher.check import K, assert_numbers, sequences
from tests.teacher.conftest import CHUNK, run_cli


def fill(engine: str, teacher: Path, data_files: dict[str, Path], out: Path, *more: str) -> CacheReader:
    """A cache filled by the command line; ``more`` are KEY=VALUE settings."""
    options = {
        "vllm": [
            f"engine_options.max_num_batched_tokens={CHUNK}",
            "engine_options.max_num_seqs=4",
            "engine_options.kv_cache_memory_bytes=67108864",
        ],
        "transformers": ["engine_options.batch_tokens=256"],
    }[engine]
    done = run_cli(
        "cache-teacher",
        *("--teacher", teacher, "--out", out, "--engine", engine, "--dtype", "float32", "--max-length", 256),
        *("--data", f"texts={data_files['texts']}", "--data", f"questions={data_files['questions']}"),
        *("--eval", f"questions={data_files['held']}"),
        *[part for option in (*options, *more, "unit_rows=5", "eval_fraction=0.2") for part in ("--set", option)],
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sealed"]
    return CacheReader.open(out)


@pytest.fixture(scope="module")
def vllm_cache(
    tiny_teacher: Path, data_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> CacheReader:
    pytest.importorskip("vllm", exc_type=ImportError)
    return fill("vllm", tiny_teacher, data_files, tmp_path_factory.mktemp("vllm") / "cache")


@pytest.fixture(scope="module")
def transformers_cache(
    tiny_teacher: Path, data_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> CacheReader:
    return fill("transformers", tiny_teacher, data_files, tmp_path_factory.mktemp("hf") / "cache")


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_every_captured_number_equals_a_forward_pass(
    engine: str, tiny_teacher: Path, request: pytest.FixtureRequest
) -> None:
    cache: CacheReader = request.getfixturevalue(f"{engine}_cache")
    rows = list(sequences(cache).values())
    lengths = {row.prompt.num_targets for row in rows if row.prompt.domain == "texts"}
    assert {1, CHUNK - 1, CHUNK, CHUNK + 1, 150, 200} <= lengths
    assert_numbers(cache, tiny_teacher, rows)


def test_both_engines_write_the_same_rows(vllm_cache: CacheReader, transformers_cache: CacheReader) -> None:
    assert_same_rows(vllm_cache, transformers_cache)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each tensor-parallel rank needs a core of its own")
def test_tensor_parallel_ranks_merge_their_vocabularies(
    tiny_teacher: Path,
    data_files: dict[str, Path],
    vllm_cache: CacheReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, *_ = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    two = fill("vllm", tiny_teacher, data_files, tmp_path / "cache", "engine_options.tensor_parallel_size=2")
    assert_same_rows(two, vllm_cache)


def assert_same_rows(one: CacheReader, two: CacheReader) -> None:
    ours, theirs = sequences(one), sequences(two)
    assert set(ours) == set(theirs)
    for sequence_id, row in ours.items():
        other = theirs[sequence_id]
        assert row.prompt.source == other.prompt.source
        assert row.prompt.split == other.prompt.split
        assert np.array_equal(row.prompt.loss_mask, other.prompt.loss_mask)
        assert np.abs(row.targets.topk_logprobs - other.targets.topk_logprobs).max() <= 4e-3
        assert np.abs(row.targets.log_z - other.targets.log_z).max() <= 2e-4
        assert np.abs(row.targets.log_tail - other.targets.log_tail).max() <= 2e-3


def test_targets_are_shifted_by_one(tiny_teacher: Path, vllm_cache: CacheReader) -> None:
    """Target t speaks of input_ids[t+1]: fed with the first t+1 tokens, the model's next-token choice is its top."""
    row = max(sequences(vllm_cache).values(), key=lambda row: row.prompt.num_targets)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    for position in (0, 1, 17, CHUNK - 1, CHUNK, row.prompt.num_targets - 1):
        ids = torch.tensor(row.prompt.input_ids[: position + 1], dtype=torch.long)[None]
        with torch.inference_mode():
            assert int(model(ids).logits[0, -1].argmax()) == row.targets.topk_ids[position, 0]


def test_the_mask_covers_the_answer_and_its_end(tiny_teacher: Path, vllm_cache: CacheReader) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    rows = [row for row in sequences(vllm_cache).values() if row.prompt.domain == "questions"]
    assert rows
    for row in rows:
        trained = row.prompt.input_ids[1:][row.prompt.loss_mask]
        assert tokenizer.decode(trained).strip().startswith(row.prompt.response)
        assert tokenizer.eos_token_id in trained


def test_rejects_and_splits_are_accounted_for(vllm_cache: CacheReader) -> None:
    totals = [commit for commit in vllm_cache.commits if commit.domain == "questions"]
    assert sum(commit.num_input_rows for commit in totals) == 13
    assert sum(commit.num_rejects for commit in totals) == 2
    assert vllm_cache.num_rows("questions", "eval") == 3
    rejects = [
        json.loads(line)
        for path in sorted((vllm_cache.root / "rejects").iterdir())
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert {reject["source"] for reject in rejects} == {"questions.jsonl:5", "questions.jsonl:10"}
    assert all(reject["reason"] for reject in rejects)
    assert vllm_cache.num_rows("texts", "train") + vllm_cache.num_rows("texts", "eval") == 12


def test_pandas_shows_what_the_row_documents(vllm_cache: CacheReader) -> None:
    frame = pd.concat(pd.read_parquet(path) for path in sorted((vllm_cache.root / "shards").iterdir()))
    row = frame[frame["domain"] == "questions"].iloc[0]
    assert row["response"].startswith("It is")
    assert dict(row["metadata"])["department"].startswith("d")
    assert len(row["topk_ids"]) == (len(row["input_ids"]) - 1) * K
    assert row["topk_logprobs"].dtype == np.float32
    assert len(row["loss_mask"]) == len(row["entropy"]) == len(row["input_ids"]) - 1


def test_a_second_run_finds_everything_done(
    tiny_teacher: Path, data_files: dict[str, Path], vllm_cache: CacheReader
) -> None:
    before = {path: path.stat().st_mtime_ns for path in vllm_cache.root.rglob("*.parquet")}
    again = fill("vllm", tiny_teacher, data_files, vllm_cache.root)
    assert {path: path.stat().st_mtime_ns for path in again.root.rglob("*.parquet")} == before
