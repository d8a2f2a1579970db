"""inspect tells what a cache holds and how good it is, and shows a row as words; the printed text holds the same."""

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from distill.__main__ import app
from distill.cache import storage
from distill.cache.reader import CacheReader
from distill.errors import CorruptionError, DataError, UsageError
from distill.report.inspect import inspect
from distill.report.render import render_inspect, render_stages, render_verify
from distill.report.verify import verify


def printed(render: Callable[..., None], report: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    render(report, console=console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_counts_and_identity(cache: Path) -> None:
    report = inspect(cache)
    counts = {(count.domain, count.split): count.num_rows for count in report.counts}
    assert counts == {("general", "train"): 8, ("general", "eval"): 2, ("medical", "train"): 5, ("medical", "eval"): 1}
    assert report.identity["top_k"] == 8
    assert report.sealed
    json.dumps(report.as_dict())


def test_bytes_per_token_add_up_to_the_files(cache: Path) -> None:
    report = inspect(cache)
    reader = CacheReader.open(cache)
    num_targets = sum(commit.num_targets.total for commit in reader.commits)
    total = sum((cache / commit.shard).stat().st_size for commit in reader.commits)
    assert sum(report.bytes_per_token.values()) == pytest.approx(total / num_targets)
    assert {"topk_ids", "topk_logprobs", "hidden_2", "footers"} <= set(report.bytes_per_token)


def test_mass_in_the_top_k_is_that_of_the_rows(cache: Path) -> None:
    report = inspect(cache)
    reader = CacheReader.open(cache)
    rows = [row for commit in reader.commits for split in ("train", "eval") for row in reader.sequences(commit, split)]
    for index, temperature in enumerate(reader.temperatures):
        masses = [
            np.exp(row.targets.topk_logprobs / temperature - row.targets.log_z[:, [index]]).sum(1) for row in rows
        ]
        assert report.topk_mass[temperature] == pytest.approx(float(np.concatenate(masses).mean()), abs=2e-3)
    assert report.num_mass_targets == sum(commit.num_targets.total for commit in reader.commits)


def test_fidelity_ranks_the_kinds_of_tail(cache: Path, teacher: Any) -> None:
    report = inspect(cache)
    assert report.num_fidelity_positions == 50
    assert [item.temperature for item in report.fidelity] == [4.0, 2.0, 1.0]
    for item in report.fidelity:
        assert item.low_rank is not None
        assert 0 < item.low_rank < item.bucket < item.renormalised < 1
    assert report.explained == teacher.projection.explained


def test_a_row_is_told_token_by_token(cache: Path) -> None:
    reader = CacheReader.open(cache)
    row = reader.sequences(reader.commits[1], "eval")[0]
    view = inspect(cache, row=7).row
    assert view is not None
    assert (view.unit, view.split, view.source) == ("00001", "eval", row.prompt.source)
    assert len(view.positions) == row.prompt.num_targets
    for t, position in enumerate(view.positions):
        assert position.token == f"w{row.prompt.input_ids[t]}"
        assert position.next_token == f"w{row.prompt.input_ids[t + 1]}"
        assert position.trained == row.prompt.loss_mask[t]
        texts, probabilities = zip(*position.alternatives, strict=True)
        assert list(texts) == [f"w{number}" for number in row.targets.topk_ids[t, :5]]
        np.testing.assert_allclose(probabilities, np.exp(row.targets.topk_logprobs[t, :5]), rtol=1e-6)


def test_rows_that_do_not_exist(cache: Path) -> None:
    assert inspect(cache, row=15).row is not None
    for row in (16, -1):
        with pytest.raises(UsageError, match=f"no row {row}: its rows are 0 to 15"):
            inspect(cache, row=row)


def test_incomplete_caches_and_caches_without_extras(tmp_path: Path, filler: Callable[..., Any]) -> None:
    filler(tmp_path, 0)
    empty = inspect(tmp_path)
    assert (empty.row, empty.fidelity, empty.topk_mass, empty.num_committed) == (None, (), {}, 0)
    filler(tmp_path, 2)
    report = inspect(tmp_path)
    assert not report.sealed
    assert (report.num_committed, report.num_units) == (2, 5)
    assert report.fidelity == ()
    assert report.row is not None
    assert report.row.positions[0].token.isdigit()  # no tokenizer in teacher/
    assert "incomplete: 2 of 5 units committed" in printed(render_inspect, report)
    assert "incomplete: 0 of 5" in printed(render_inspect, empty)


def test_a_cache_without_hidden_states(tmp_path: Path, make_teacher: Any, plan_of: Any, fill: Any) -> None:
    teacher = make_teacher(hidden_bytes=0)
    fill(tmp_path, teacher, plan_of(teacher, rows={"general": 3}))
    report = inspect(tmp_path)
    assert report.explained is None
    assert "low-rank" in printed(render_inspect, report)


def test_what_cannot_be_inspected(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError):
        inspect(tmp_path / "nothing")
    shard = storage.inside(cache, CacheReader.open(cache).commits[0].shard)
    shard.write_bytes(b"nothing")
    with pytest.raises(CorruptionError, match="unit 00000"):
        inspect(cache)


def test_a_damaged_fidelity_file_is_refused(cache: Path) -> None:
    (cache / "fidelity.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptionError, match=r"fidelity\.safetensors"):
        inspect(cache)


def test_a_damaged_tokenizer_is_refused(cache: Path) -> None:
    (cache / "teacher" / "tokenizer.json").write_bytes(b"nothing")
    with pytest.raises(CorruptionError, match="is no tokenizer"):
        inspect(cache)


def test_the_printed_report(cache: Path) -> None:
    text = printed(render_inspect, inspect(cache))
    for part in (
        "identity",
        "top_k",
        "medical",
        "bytes per token",
        "low-rank tail",
        "what the teacher expected there",
        "●",
    ):
        assert part in text


def test_a_row_is_told_by_what_came(cache: Path) -> None:
    """Beside a token stands what was expected in its place, not after it."""
    report = inspect(cache)
    assert report.row is not None
    first, second = (
        dataclasses.replace(
            report.row.positions[0], token=token, next_token=after, trained=trained, alternatives=((word, 0.5),)
        )
        for token, after, trained, word in (("one", "two", False, "II"), ("two", "three", True, "III"))
    )
    row = dataclasses.replace(report.row, positions=(first, second))
    text = printed(render_inspect, dataclasses.replace(report, row=row))
    table = [line.split() for line in text.splitlines()[-4:]]
    entropy = f"{first.entropy:.2f}"
    assert table[:3] == [["one"], ["two", entropy, "II", "0.500"], ["●", "three", entropy, "III", "0.500"]]


def test_nothing_is_cut_where_the_output_is_no_terminal(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    done = CliRunner().invoke(app, ["inspect", str(cache)])
    assert inspect(cache).identity["teacher_weights"] in done.stdout
    assert "…" not in done.stdout
    monkeypatch.setenv("COLUMNS", "60")
    done = CliRunner().invoke(app, ["inspect", str(cache)])
    assert max(map(len, done.stdout.splitlines())) <= 60


def test_stored_text_is_never_markup(cache: Path) -> None:
    report = inspect(cache)
    assert report.row is not None
    position = dataclasses.replace(report.row.positions[0], next_token="[bold red] x[/bold]\n")
    row = dataclasses.replace(report.row, positions=(position,), source="\x1b[2Jx.jsonl")
    text = printed(render_inspect, dataclasses.replace(report, row=row))
    assert r"[bold␣red]␣x[/bold]\n" in text
    assert "�[2Jx.jsonl" in text


def test_the_printed_verdict(cache: Path) -> None:
    assert "5 of 5 units, 16 rows, 0 rejects" in printed(render_verify, verify(cache))
    assert "every byte is as committed" in printed(render_verify, verify(cache))
    (cache / "commits" / "00003.json").unlink()
    text = printed(render_verify, verify(cache))
    assert "commits/00003.json" in text
    assert "2 problems" in text


def test_printed_stages() -> None:
    figures = {"kl": {2.0: 0.25, 1.0: 0.5}, "ce": 1.5}
    stage = {
        "stage": 2,
        "num_steps": 1200,
        "best_step": 900,
        "objective": 0.75,
        "already_finished": True,
        "evaluation": {"domains": {"medical": figures}, "overall": figures},
        "best": "run/stage2/best",
        "notes": ["no held-out rows of general"],
    }
    text = printed(render_stages, [stage, {**stage, "stage": 3, "evaluation": None, "objective": None, "notes": []}])
    assert re.search(r"stage +steps +best step +domain +KL T=2 +KL T=1 +CE", text)
    assert re.search(r"2 +1,200 +900 +medical +0.2500 +0.5000 +1.5000", text)
    assert re.search(r"3 +1,200 +900 +– +– +– +–", text)
    for part in ("stage 2: no held-out rows of general", "stage 2 (finished before): best checkpoint run/stage2/best"):
        assert part in text
