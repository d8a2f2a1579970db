"""The views of SQL hold what the rows hold, position by position; wrong queries and damaged shards are told apart."""

import builtins
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from distill.__main__ import app
from distill.cache.reader import CacheReader
from distill.errors import CorruptionError, DataError, UsageError
from distill.report.inspect import inspect
from distill.report.sql import query, tail_column


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["sql", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_tokens_are_the_targets_position_by_position(cache: Path) -> None:
    answer = query(cache, "select * from tokens order by row, position")
    got = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
    reader = CacheReader.open(cache)
    rows = [row for commit in reader.commits for split in ("train", "eval") for row in reader.sequences(commit, split)]
    expected = [(number, t, row) for number, row in enumerate(rows) for t in range(row.prompt.num_targets)]
    assert len(got) == len(expected)
    for token, (number, t, row) in zip(got, expected, strict=True):
        prompt, targets = row.prompt, row.targets
        assert (token["row"], token["position"], token["sequence_id"]) == (number, t, prompt.sequence_id)
        assert (token["token_id"], token["next_id"]) == (prompt.input_ids[t], prompt.input_ids[t + 1])
        assert (token["trained"], token["top1_id"]) == (prompt.loss_mask[t], targets.topk_ids[t, 0])
        assert token["entropy"] == targets.entropy[t]
        assert token["top1_prob"] == pytest.approx(np.exp(targets.topk_logprobs[t, 0]))
        ranks = np.flatnonzero(targets.topk_ids[t] == prompt.input_ids[t + 1])
        assert token["next_rank"] == (ranks[0] + 1 if len(ranks) else None)
        assert token["next_logprob"] == (targets.topk_logprobs[t, ranks[0]] if len(ranks) else None)
        for index, temperature in enumerate(reader.temperatures):
            mass = np.exp(targets.log_tail[t, index])
            assert token[tail_column(temperature)] == pytest.approx(mass, rel=1e-5)
    assert any(token["next_rank"] for token in got)


def test_rows_are_numbered_as_inspect_numbers_them(cache: Path) -> None:
    answer = query(cache, "select row, unit, source, num_tokens, num_trained, mean_entropy from rows order by row")
    rows = list(answer.rows)
    assert [row[0] for row in rows] == list(range(16))
    for number in (0, 7, 15):
        view = inspect(cache, number).row
        assert view is not None
        assert rows[number][1:3] == (view.unit, view.source)
        assert rows[number][3] == len(view.positions) + 1
        trained = [position.entropy for position in view.positions if position.trained]
        assert rows[number][4] == len(trained)
        assert rows[number][5] == pytest.approx(np.mean(trained), rel=1e-6)


def test_an_unsealed_cache_shows_its_committed_units_alone(tmp_path: Path, filler: Callable[..., Any]) -> None:
    root = tmp_path / "it's half"
    filler(root, 2)
    (root / "shards" / "00009-0000000000000000.parquet").write_bytes(b"left by a killed writer")
    assert list(query(root, "select unit, count(*) from rows group by unit order by unit").rows) == [
        ("00000", 4),
        ("00001", 4),
    ]
    assert list(query(root, "select count(*) from rejects").rows) == [(0,)]


def test_temperatures_have_names_without_quotes() -> None:
    assert [tail_column(temperature) for temperature in (4.0, 1.5, 1e-5)] == [
        "tail_mass_4",
        "tail_mass_1_5",
        "tail_mass_1e_05",
    ]


def test_the_vocabulary_reads_as_words(cache: Path) -> None:
    assert list(query(cache, "select text from vocabulary where token_id = 7").rows) == [("w7",)]
    (cache / "teacher" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"no teacher/tokenizer\.json"):
        query(cache, "select text from vocabulary")


def test_json_holds_what_json_can_hold(cache: Path) -> None:
    sql = (
        "select 1.50::decimal(4,2) as a, 3::decimal(4,2) as b, 'nan'::float as c, date '2020-01-02' as d, [1,null] as e"
    )
    assert json.loads(run(str(cache), sql, "--json")) == {
        "columns": ["a", "b", "c", "d", "e"],
        "rows": [{"a": 1.5, "b": 3, "c": None, "d": "2020-01-02", "e": [1, None]}],
    }
    metadata = json.loads(run(str(cache), "select metadata from rows where row = 1", "--json"))["rows"]
    assert metadata == [{"metadata": {"department": "cardiology"}}]


def test_csv_is_whole_and_a_table_says_when_it_is_not(cache: Path) -> None:
    lines = list(csv.reader(io.StringIO(run(str(cache), "select row, prompt from rows order by row", "--csv"))))
    assert lines[0] == ["row", "prompt"]
    assert len(lines) == 17
    text = run(str(cache), "select row from rows", "--limit", "3")
    assert "the first 3 rows" in text
    assert "the first" not in run(str(cache), "select row from rows", "--limit", "16")


def test_wrong_queries_say_what_there_is(cache: Path) -> None:
    for sql in ("selec 1", "select nix from rows", "select * from positions", "select 'x'::int from rows"):
        with pytest.raises(UsageError, match="views are rows, tokens, vocabulary, rejects"):
            list(query(cache, sql).rows)
    with pytest.raises(UsageError, match="contradict"):
        CliRunner().invoke(app, ["sql", str(cache), "select 1", "--csv", "--json"], catch_exceptions=False)


def test_damaged_caches_are_refused(cache: Path, tmp_path: Path, filler: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="no cache"):
        query(tmp_path, "select 1")
    filler(tmp_path / "empty", 0)
    with pytest.raises(DataError, match="no committed unit"):
        query(tmp_path / "empty", "select 1")
    shard = sorted((cache / "shards").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[-4:] = b"XXXX"
    shard.write_bytes(data)
    with pytest.raises(CorruptionError, match="distill verify"):
        list(query(cache, "select sum(num_tokens) from rows").rows)
    shard.write_bytes(data[:-4])
    with pytest.raises(CorruptionError, match="not as long as it was committed"):
        query(cache, "select 1")


def test_without_duckdb_the_extra_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **others: Any) -> Any:
        if name == "duckdb":
            raise ImportError(name)
        return real(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'distill\[sql\]'"):
        query(cache, "select 1")
