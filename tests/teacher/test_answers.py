"""``cache-teacher --generate``: the teacher's own answers, from the command line to Parquet.

What it protects: that the stored tokens, mask and text are one answer, that every target belongs to it, and that the
same command gives the same cache.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distill.cache.reader import CacheReader
from distill.cache.samples import read_samples
from distill.cache.tensors import load
from tests.teacher.check import assert_numbers, sequences
from tests.teacher.conftest import CHUNK, run_cli

OPTIONS = {
    "vllm": (f"engine_options.max_num_batched_tokens={CHUNK}", "engine_options.max_num_seqs=4"),
    "transformers": (),
}


def fill(engine: str, teacher: Path, data_files: dict[str, Path], out: Path, *more: str) -> CacheReader:
    """Questions answered by the teacher."""
    settings = ("unit_rows=5", "eval_fraction=0.3", "generate.max_tokens=24", "samples.max_tokens=12", *more)
    done = run_cli(
        *("cache-teacher", "--teacher", teacher, "--out", out, "--engine", engine, "--dtype", "float32"),
        *("--max-length", 128, "--data", f"questions={data_files['questions']}", "--generate"),
        *[part for option in (*OPTIONS[engine], *settings) for part in ("--set", option)],
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sealed"]
    return CacheReader.open(out)


@pytest.fixture(scope="module")
def drawn(tiny_teacher: Path, data_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    pytest.importorskip("vllm", exc_type=ImportError)
    out = tmp_path_factory.mktemp("drawn") / "cache"
    return fill("vllm", tiny_teacher, data_files, out, "generate.num=2", "targets.num_samples=20")


@pytest.fixture(scope="module")
def greedy(tiny_teacher: Path, data_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    out = tmp_path_factory.mktemp("greedy") / "cache"
    return fill("transformers", tiny_teacher, data_files, out, "generate.temperature=0")


def test_every_number_of_an_answer_equals_a_forward_pass(drawn: CacheReader, tiny_teacher: Path) -> None:
    assert_numbers(drawn, tiny_teacher, list(sequences(drawn).values()))


def test_the_transformers_engine_writes_greedy_answers(greedy: CacheReader, tiny_teacher: Path) -> None:
    rows = list(sequences(greedy).values())
    assert_numbers(greedy, tiny_teacher, rows)
    for row in rows:
        answer = row.prompt.input_ids[1:][row.prompt.loss_mask]
        assert np.array_equal(answer, row.targets.topk_ids[row.prompt.loss_mask, 0])


def test_a_row_is_one_prompt_and_one_answer(drawn: CacheReader, tiny_teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    rows = list(sequences(drawn).values())
    assert len(rows) == 18  # two answers to each of nine questions; the row without an answer has a question too
    for row in rows:
        first = int(row.prompt.loss_mask.argmax()) + 1
        assert row.prompt.loss_mask[first - 1 :].all()
        asked, answer = row.prompt.input_ids[:first], row.prompt.input_ids[first:]
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": row.prompt.prompt}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_dict=False,
        )
        assert asked.tolist() == expected
        assert 1 <= len(answer) <= 24
        assert len(answer) == 24 or answer[-1] == tokenizer.eos_token_id
        assert row.prompt.response == tokenizer.decode(answer, skip_special_tokens=True)
        assert row.prompt.metadata["answer"].startswith("It is") or row.prompt.metadata["answer"] == ""
    by_prompt: dict[str, set[str]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt.prompt_id, set()).add(row.prompt.source)
    assert all(len(sources) == 2 for sources in by_prompt.values())


def test_draws_are_stored_for_each_position(drawn: CacheReader) -> None:
    for row in sequences(drawn).values():
        assert row.targets.sampled_counts is not None
        assert row.targets.sampled_counts.sum() == 20 * row.prompt.num_targets


def test_samples_are_the_greedy_answers_to_held_out_prompts(drawn: CacheReader, tiny_teacher: Path) -> None:
    samples = read_samples(drawn)
    assert samples
    held_out = {row.prompt.prompt_id for row in sequences(drawn).values() if row.prompt.split == "eval"}
    assert {sample.prompt_id for sample in samples} <= held_out
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    options = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    for sample in samples:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": sample.prompt}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_tensors="pt",
            return_dict=False,
        )
        assert sample.input_ids == tuple(ids[0].tolist())
        written = model.generate(ids, attention_mask=ids * 0 + 1, generation_config=options)[0, ids.shape[1] :]
        assert sample.response_ids == tuple(written.tolist())
        assert sample.response == tokenizer.decode(written, skip_special_tokens=True)


def test_canaries_and_samples_are_sealed_with_the_cache(drawn: CacheReader) -> None:
    assert {"canaries.safetensors", "samples.parquet"} <= set(drawn.files)
    arrays, metadata = load((drawn.root / "canaries.safetensors").read_bytes(), name="canaries")
    assert "0/topk_ids" in arrays
    assert 0 <= float(metadata["noise"]) < 1e-3


def test_settings_of_another_kind_are_refused(
    drawn: CacheReader, tiny_teacher: Path, data_files: dict[str, Path]
) -> None:
    command = ("cache-teacher", "--teacher", tiny_teacher, "--out", drawn.root, "--dtype", "float32")
    data = ("--max-length", 128, "--data", f"questions={data_files['questions']}")
    sets = ("--set", "unit_rows=5", "--set", "eval_fraction=0.3", "--set", "targets.num_samples=20")
    done = run_cli(*command, *data, *sets)
    assert done.returncode == 4
    assert "generation: cache" in done.stderr
    texts = run_cli(*command, "--data", f"texts={data_files['texts']}", "--generate")
    assert texts.returncode == 3
    assert "no prompts that the teacher could answer" in texts.stderr
