"""The plan of a cache against the cache: counts are equal, columns that need no teacher are equal, the total is near.

What it protects: the bytes that a user budgets (within 10% of the shards of a real capture), reading no weights, the
JSON that scripts read, exit codes. To write the schema anew after a change of the models:
``python -m tests.report.test_plan``.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from distill.__main__ import app
from distill.cache.reader import CacheReader
from distill.config import CacheConfig
from distill.errors import DataError, UsageError
from distill.report.inspect import inspect
from distill.report.plan import Look, plan
from distill.report.plan_record import PlanReport
from distill.report.render_plan import render_plan
from distill.report.resources import Machine, cost_of
from distill.report.typical import typical_bytes
from distill.report.workload import KNOWN
from distill.teacher.job import cache_teacher
from tests.teacher.families import save_tiny

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "schemas" / "commands" / "plan.json"
ROWS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Questions in English and Chinese, one of them without an answer, and held-out ones."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("general.csv", "medical-eval.csv"):
        lines = (ROOT / "examples" / "data" / name).read_text(encoding="utf-8").splitlines()[: ROWS + 1]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (folder / "general.csv").open("a", encoding="utf-8") as file:
        file.write("What is left unsaid?,,,en,nothing\n")
    return {name: folder / f"{name}.csv" for name in ("general", "medical-eval")}


@pytest.fixture(scope="module")
def config(tiny_teacher: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> CacheConfig:
    return CacheConfig.model_validate(
        {
            "teacher": str(tiny_teacher),
            "data": {"general": [str(data["general"])]},
            "eval": {"medical": [str(data["medical-eval"])]},
            "out": str(tmp_path_factory.mktemp("cache") / "cache"),
            "engine": "transformers",
            "dtype": "float32",
            "max_length": 128,
            "unit_rows": 10,
        }
    )


@pytest.fixture(scope="module")
def shell(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's folder without its weights."""
    folder = tmp_path_factory.mktemp("shell")
    for path in tiny_teacher.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def report(config: CacheConfig, shell: Path) -> PlanReport:
    """A plan without weights."""
    return plan(config.model_copy(update={"teacher": str(shell)}), quiet=True)


def test_the_plan_is_that_of_the_cache_that_follows(config: CacheConfig, report: PlanReport) -> None:
    cache_teacher(config, quiet=True)
    reader = CacheReader.open(config.out)
    found = {
        (domain, split): (
            sum(commit.num_rows[split] for commit in reader.units(domain)),
            sum(commit.num_targets[split] for commit in reader.units(domain)),
            sum(commit.num_trained[split] for commit in reader.units(domain)),
        )
        for domain in reader.domains
        for split in ("train", "eval")
    }
    planned = {(s.domain, s.split): (s.num_rows, s.num_targets, s.num_trained) for s in report.counts.splits}
    assert planned == {key: counts for key, counts in found.items() if any(counts)}
    assert report.counts.num_units == len(reader.commits)
    assert sum(reject.num_rows for reject in report.counts.rejects) == sum(c.num_rejects for c in reader.commits) == 1
    real = {name: size * report.counts.num_targets for name, size in inspect(config.out).bytes_per_token.items()}
    for name in KNOWN:
        assert report.storage.columns[name] == pytest.approx(real[name], rel=1e-3, abs=2), name
    total = sum(commit.num_bytes for commit in reader.commits)
    assert report.storage.shards == pytest.approx(total, rel=0.1)
    projection, fidelity = (
        Path(config.out, f"{name}.safetensors").stat().st_size for name in ("projection", "fidelity")
    )
    assert report.storage.projection == pytest.approx(projection, rel=0.1)
    assert report.storage.fidelity >= 0.9 * fidelity


def test_a_sample_of_rows_stands_for_all(config: CacheConfig, report: PlanReport) -> None:
    sampled = plan(config, look=Look(sample=20), quiet=True)
    assert 20 <= sampled.counts.num_read < sampled.counts.num_input_rows == report.counts.num_input_rows
    interval, total = sampled.counts.targets_interval, report.counts.num_targets
    assert interval is not None
    assert interval.low < sampled.counts.num_targets < interval.high
    assert sampled.counts.num_targets == pytest.approx(total, rel=0.25)
    assert sampled.counts.num_units == report.counts.num_units
    assert report.counts.targets_interval is None
    assert sampled.storage.shards == pytest.approx(report.storage.shards, rel=0.25)


def test_optional_columns_take_their_bytes(config: CacheConfig, report: PlanReport) -> None:
    targets = {
        "top_k": 16,
        "hidden_bytes": 64,
        "num_samples": 50,
        "layers": [1],
        "layer_bytes": 32,
        "heads": {2: [0, 1]},
    }
    other = config.model_copy(update={"targets": config.targets.model_validate(targets)})
    columns = plan(other, quiet=True).storage.columns
    extra = {
        "sampled_ids",
        "sampled_counts",
        "layer1_hidden",
        "layer2_q",
        "layer2_q_scale",
        "layer2_k",
        "layer2_k_scale",
    }
    assert set(columns) - set(report.storage.columns) == extra
    assert columns["layer2_q"] == pytest.approx(2 * columns["layer2_k"], rel=0.1)  # two heads share one of the keys
    assert columns["topk_ids"] < report.storage.columns["topk_ids"] / 3
    bare = config.targets.model_copy(update={"hidden_bytes": 0})
    assert "hidden" not in typical_bytes(bare, vocab_size=500, hidden_size=64)


@pytest.mark.parametrize("look", [Look(), Look(measure=600)])
def test_layers_and_heads_are_in_the_total(config: CacheConfig, tmp_path: Path, look: Look) -> None:
    targets = {"layers": [1, 2], "layer_bytes": 64, "heads": {2: [0, 1, 3]}}
    values = {**config.model_dump(), "targets": targets, "out": str(tmp_path / "cache")}
    other = CacheConfig.model_validate(values)
    cache_teacher(other, quiet=True)
    total = sum(commit.num_bytes for commit in CacheReader.open(other.out).commits)
    real = inspect(other.out).bytes_per_token
    report = plan(other, look=look, quiet=True)
    assert report.storage.shards == pytest.approx(total, rel=0.1)
    for name in (name for name in real if name.startswith("layer")):
        planned = report.storage.columns[name] / report.counts.num_targets
        # Random weights have no large coordinates, which make a trained teacher's queries and keys pack better.
        near = 0.1 if look.measure or name.endswith("_hidden") else 0.25
        assert planned == pytest.approx(real[name], rel=near), name
    if look.measure:
        assert report.proposal is not None
        assert report.proposal.bytes_per_target is not None
        assert report.proposal.bytes_per_target > sum(size for name, size in real.items() if name.startswith("layer"))


def test_rate_time_and_price(config: CacheConfig, report: PlanReport) -> None:
    machine = Machine(gpu_flops=1e12, utilisation=0.5, num_gpus=4, price=2.0)
    assert report.flops is not None
    assert report.cost is None  # nothing was said of a machine
    derived = cost_of(1e6, flops=report.flops, measured=3.0, machine=machine)
    assert derived is not None
    assert derived.tokens_per_s == pytest.approx(4 * 1e12 * 0.5 / report.flops.total)
    assert derived.price == pytest.approx(2.0 * 4 * derived.hours)
    measured = cost_of(1e6, flops=report.flops, measured=3.0, machine=Machine())
    assert measured is not None
    assert (measured.source, measured.tokens_per_s) == ("measured", 3.0)
    given = plan(config, machine=Machine(tokens_per_s=100.0), quiet=True).cost
    assert given is not None
    assert (given.source, given.price) == ("given", None)
    assert given.hours == pytest.approx(given.num_tokens / 100 / 3600, rel=1e-3)
    assert given.num_tokens > report.counts.num_targets  # the projection is fitted too


def test_measured_sizes_rates_and_a_proposal(tmp_path: Path) -> None:
    """A small teacher of 500 words, so that everything is tried in a moment."""
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoTokenizer

    folder = save_tiny("Qwen3", tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save_pretrained(folder)
    system = " ".join(f"t{3 + 5 * j}" for j in range(30))  # what all rows begin with is stored once
    texts = (" ".join(f"t{3 + (i * i + 7 * j * j + i * j) % 497}" for j in range(60)) for i in range(100))
    rows = [{"text": f"{system} {text}"} for text in texts]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CacheConfig.model_validate(
        {
            "teacher": str(folder),
            "data": {"text": [str(tmp_path / "text.jsonl")]},
            "out": str(tmp_path / "cache"),
            "engine": "transformers",
            "max_length": 128,
        }
    )
    report = plan(config, look=Look(measure=600), quiet=True)
    assert report.measured is not None
    assert report.cost is not None
    assert report.cost.source == "measured"
    assert report.storage.source == "measured"
    cache_teacher(config, quiet=True)
    total = sum(commit.num_bytes for commit in CacheReader.open(config.out).commits)
    assert report.storage.shards == pytest.approx(total, rel=0.1)
    assert report.proposal is not None
    assert report.proposal.hidden_bytes in (0, 64, 128, 256)
    asked = {"top_k": report.proposal.top_k, "hidden_bytes": report.proposal.hidden_bytes}
    proposed = config.model_copy(update={"targets": config.targets.model_copy(update=asked)})
    again = plan(proposed, look=Look(measure=600), quiet=True).storage.bytes_per_target
    assert report.proposal.bytes_per_target == pytest.approx(again, rel=0.1)
    console = Console(file=io.StringIO(), width=160)
    render_plan(report, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "total variation to the teacher (96 positions)" in text
    assert report.proposal.reasons[0] in " ".join(text.split())


def test_json_is_as_its_schema_says(shell: Path, data: dict[str, Path]) -> None:
    arguments = ["plan", "--teacher", str(shell), "--data", f"general={data['general']}", "--engine", "vllm", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--gpu-memory", "0.5", "--out", "anywhere"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert schema == PlanReport.model_json_schema(mode="serialization")
    jsonschema.validate(found, schema)
    assert not jsonschema.Draft202012Validator(schema).is_valid({**found, "surprise": 1})
    assert found["memory"]["kv_tokens"] == 8192 + 2048
    assert {weights["dtype"]: weights["tensor_parallel_size"] for weights in found["memory"]["weights"]}[
        "bfloat16"
    ] is None
    assert any("does not fit" in note for note in found["notes"])


def test_plan_takes_every_option_that_describes_a_cache() -> None:
    def options(name: str) -> set[str]:
        group = typer.main.get_command(app)
        command: Any = group.get_command(typer.Context(group), name)  # type: ignore[attr-defined]
        return {option for parameter in command.params for option in parameter.opts}

    assert options("cache-teacher") - options("plan") == {"--worker", "--ray", "--ray-workers"}


@pytest.mark.parametrize(
    ("change", "look", "error", "says"),
    [
        ({"teacher": "/nowhere/at/all"}, Look(), UsageError, "neither a folder"),
        ({"max_length": 100_000}, Look(), UsageError, "at most 2048 positions"),
        ({"generate": {}}, Look(measure=10), UsageError, "Leave generate out"),
        ({"data": {"d": ["/nowhere.csv"]}, "eval": {}}, Look(), DataError, "does not exist"),
        ({"targets": {"layers": [99]}}, Look(), UsageError, "layer 99"),
        ({"max_length": 2}, Look(), DataError, "becomes a sequence"),
    ],
)
def test_errors_come_before_any_weights(
    config: CacheConfig, shell: Path, change: dict[str, Any], look: Look, error: type[Exception], says: str
) -> None:
    values = {**config.model_dump(), "teacher": str(shell), **change}
    with pytest.raises(error, match=says):
        plan(CacheConfig.model_validate(values), look=look, quiet=True)


def test_measuring_needs_two_sequences(config: CacheConfig, shell: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "all alone"}\n')
    one = {"data": {"d": (str(tmp_path / "one.jsonl"),)}, "eval": {}, "teacher": str(shell), "eval_fraction": 0.0}
    with pytest.raises(DataError, match="at least two training sequences"):
        plan(config.model_copy(update=one), look=Look(measure=10), quiet=True)


if __name__ == "__main__":
    text = json.dumps(PlanReport.model_json_schema(mode="serialization"), indent=2)
    SCHEMA.write_text(text + "\n", encoding="utf-8")
