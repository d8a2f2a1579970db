"""The whole path by the command line: cache with the real vLLM, verify, inspect, train three stages without it.

What it protects: that the parts fit, that a trainer needs neither vllm nor the teacher's weights, and that each thing a
user gets wrong with a finished cache ends in one paragraph and the right exit code.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import qwen_tokenizer_folder

pytest.importorskip("vllm", exc_type=ImportError)

STAGES = "stages={1: {learning_rate: 0.01, max_steps: 8}, 2: {learning_rate: 0.01, max_steps: 8}, 3: {max_steps: 4}}"


def distill(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; ``path`` is put before everything that Python can import."""
    environment = {**os.environ, "COLUMNS": "160", **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, "-m", "distill", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of two domains."""
    folder = tmp_path_factory.mktemp("pipeline")
    for domain, word in (("general", "river"), ("medical", "heart")):
        rows = [{"instruction": f"Say {word} {i}.", "output": f"{word} {i}, {word} {i}!"} for i in range(40)]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path, tiny_teacher: Path) -> Path:
    """Filled by vLLM."""
    out = folder / "cache"
    data = [part for domain in ("general", "medical") for part in ("--data", f"{domain}={folder / domain}.jsonl")]
    engine = "engine_options={max_num_batched_tokens: 128, kv_cache_memory_bytes: 67108864}"
    options = ("--hidden-bytes", 24, "--top-k", 16, "--set", "eval_fraction=0.2", "--set", engine)
    done = distill("cache-teacher", "--teacher", tiny_teacher, *data, "--out", out, "--dtype", "float32", *options)
    assert done.returncode == 0, done.stderr
    assert "sealed" in done.stdout
    return out


@pytest.fixture(scope="module")
def student(folder: Path, tiny_teacher: Path) -> Path:
    """Another random model with the teacher's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    config = Qwen3Config.from_pretrained(tiny_teacher)
    config.update({"hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.1})
    config.layer_types = ["full_attention"] * 4
    out = folder / "student"
    Qwen3ForCausalLM(config).save_pretrained(out)
    for path in tiny_teacher.iterdir():
        if not (out / path.name).exists():
            shutil.copy(path, out / path.name)
    return out


def train(cache: Path, student: Path, out: Path, *more: object, path: Path | None = None) -> Any:
    options = ("--cache", cache, "--student", student, "--out", out, "--tune", "full", "--precision", "fp32")
    return distill("train", *options, "--set", STAGES, *more, path=path)


def test_verify_and_inspect(cache: Path) -> None:
    verified = distill("verify", cache, "--json")
    assert verified.returncode == 0, verified.stderr
    inspected = distill("inspect", cache, "--json", "--row", 3)
    report = json.loads(inspected.stdout)
    assert report["sealed"]
    assert report["row"]["response"]
    assert len(report["fidelity"]) == 3
    assert all(0 <= item["low_rank"] < item["renormalised"] <= 1 for item in report["fidelity"])
    assert "what the teacher expected there" in distill("inspect", cache).stdout


def test_three_stages_without_vllm_and_without_the_teacher(
    cache: Path, student: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    moved = shutil.copytree(cache, tmp_path / "elsewhere")  # as on another machine
    blocked = tmp_path_factory.mktemp("blocked")
    (blocked / "vllm.py").write_text("raise ImportError('vllm is not on this machine')\n")
    run = tmp_path / "run"
    done = train(moved, student, run, "--stage", "1-3", "--student-layers", 2, "--json", path=blocked)
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert [stage["stage"] for stage in stages] == [1, 2, 3]
    for number in (1, 2, 3):
        lines = [json.loads(line) for line in (run / f"stage{number}" / "metrics.jsonl").read_text().splitlines()]
        evaluations = [line for line in lines if line["kind"] == "eval"]
        assert evaluations[-1]["objective"] < evaluations[0]["objective"]
    again = train(moved, student, run, "--stage", "1-3", "--student-layers", 2, "--json", path=blocked)
    assert all(stage["already_finished"] for stage in json.loads(again.stdout)["stages"])


def test_a_stage_begins_where_the_one_before_ended(cache: Path, student: Path, tmp_path: Path) -> None:
    done = train(cache, student, tmp_path / "run", "--stage", 2)
    assert done.returncode == 3
    assert "--stage 1 first" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--set", "stages.1.temperature=3"), 4, "4, 2, 1"),
        (("--set", "stages.1.weights.attention=0.5"), 4, "no queries and keys"),
        (("--set", "stages.1.tail=sampled"), 4, "no ids drawn"),
        (("--set", "stages.1.weigths.kl=1"), 2, "did you mean 'weights'"),
        (("--set", "general=law"), 3, "general, medical"),
        (("--set", "lora.target_modules=[nothing]", "--tune", "lora"), 2, "nothing"),
        (("--stage", "4"), 2, "--stage takes"),
        (("--cache", "/nowhere"), 3, "/nowhere"),
        (("--student", "/nowhere"), 2, "/nowhere"),
    ],
)
def test_what_a_user_gets_wrong(
    cache: Path, student: Path, tmp_path: Path, options: tuple[str, ...], code: int, says: str
) -> None:
    stage = () if "--stage" in options else ("--stage", "1")
    done = train(cache, student, tmp_path / "run", *stage, *options)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_student_with_another_token_map_is_refused(cache: Path, student: Path, tmp_path: Path) -> None:
    """The same number of tokens, two of them exchanged: the size proves nothing."""
    other = shutil.copytree(student, tmp_path / "other")
    tokenizer = json.loads((qwen_tokenizer_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    done = train(cache, other, tmp_path / "run", "--stage", 1)
    assert done.returncode == 4, done.stderr
    assert "token" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_half_written_cache_is_refused(cache: Path, student: Path, tmp_path: Path) -> None:
    half = shutil.copytree(cache, tmp_path / "half")
    (half / "manifest.json").unlink()
    (half / "commits" / "00000.json").unlink()
    done = train(half, student, tmp_path / "run", "--stage", 1)
    assert done.returncode == 3
    assert "1 of 2 units" in done.stderr
    torn = next((cache / "shards").iterdir())
    broken = shutil.copytree(cache, tmp_path / "broken")
    (broken / "shards" / torn.name).write_bytes(torn.read_bytes()[:-1000])
    done = distill("verify", broken)
    assert done.returncode == 5
    assert torn.name in done.stdout + done.stderr
