"""A configuration becomes sources in a fixed order, and every way to name data wrongly says how to name it right."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.config import CacheConfig
from distill.data.sources import Source, open_sources
from distill.errors import DataError

Configure = Callable[..., CacheConfig]
Write = Callable[..., Path]

ROW = {"question": "q", "answer": "a"}


def test_order_and_sides(write_jsonl: Write, tmp_path: Path) -> None:
    paths = {name: write_jsonl([ROW, ROW], f"{name}.jsonl") for name in ("b", "a", "held", "alone")}
    config = CacheConfig(
        teacher="t",
        out="o",
        data={"medical": (str(paths["b"]), str(paths["a"])), "general": (str(paths["b"]),)},
        eval={"medical": (str(paths["held"]),), "extra": (str(paths["alone"]),)},
    )
    sources = open_sources(config)
    assert [(source.domain, source.name, source.split) for source in sources] == [
        ("extra", "alone.jsonl", "eval"),
        ("general", "b.jsonl", None),
        ("medical", "b.jsonl", "train"),
        ("medical", "a.jsonl", "train"),
        ("medical", "held.jsonl", "eval"),
    ]
    assert all(len(source) == 2 for source in sources)
    assert sources[0].path == str(tmp_path / "alone.jsonl")
    assert len(sources[0].sha256) == 64
    assert sources[0].columns == ("question", "answer")


def test_folder_and_glob(write_jsonl: Write, make_config: Configure, tmp_path: Path) -> None:
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    for name in ("folder/b.jsonl", "folder/a.json", "folder/c.csv", "folder/notes.jsonl.bak", "folder/deeper/d.jsonl"):
        write_jsonl([ROW], name)
    (tmp_path / "folder" / "c.csv").write_text("question,answer\nq,a\n")

    def names(path: str) -> list[str]:
        return [source.name for source in open_sources(make_config(tmp_path / path))]

    assert names("folder") == ["a.json", "b.jsonl", "c.csv"]
    assert names("folder/*.json*") == ["a.json", "b.jsonl"]
    assert names("**/d.jsonl") == ["d.jsonl"]


def test_a_linked_file_keeps_its_name(write_jsonl: Write, open_one: Callable[..., Source], tmp_path: Path) -> None:
    blob = write_jsonl([ROW], "0f1e2d3c")
    (tmp_path / "named.jsonl").symlink_to(blob)
    assert open_one(tmp_path / "named.jsonl").name == "named.jsonl"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.jsonl", "does not exist. Give a file, a glob, a folder, or a hub data set"),
        ("gone/gone.csv", "does not exist"),
        ("notes.txt", r"notes.txt is not a data file. Known extensions are .csv, .jsonl"),
        ("none-*.csv", "no data file matches"),
        ("empty-folder", "empty-folder has no data files"),
        ("pipe.csv", "pipe.csv is not a data file"),
        ("empty.jsonl", "empty.jsonl has no rows"),
        ("header-only.csv", "header-only.csv has no rows"),
        ("array.json", r"none of its 3 rows can be read \(one JSON object on each line.*at array.json:1: not JSON"),
        (
            "not-gzip.csv.gz",
            "none of its 1 rows can be read. .*at not-gzip.csv.gz:1: .*the compressed data breaks off: Not a gzip",
        ),
        ("not-zstd.jsonl.zst", "none of its 1 rows can be read"),
        ("wrong.parquet", "none of its 1 rows can be read. .*the Parquet file is damaged"),
        ("utf16.csv", "none of its 1 rows can be read. .*the header cannot be read: byte 0xff at byte 1"),
        (
            "wrong-columns.csv",
            r"wrong-columns.csv: no columns to learn from.*found are title, body.*--column prompt=NAME",
        ),
        ("x" * 300 + ".csv", "cannot look up .*: File name too long"),
    ],
)
def test_data_that_cannot_be_used(
    path: str, message: str, make_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("text")
    Path("empty-folder").mkdir()
    os.mkfifo("pipe.csv")
    Path("empty.jsonl").write_text("\n\n")
    Path("header-only.csv").write_text("question,answer\n")
    Path("array.json").write_text('[\n{"question": "q", "answer": "a"}\n]\n'.replace("}", "},"))
    for name in ("not-gzip.csv.gz", "not-zstd.jsonl.zst", "wrong.parquet"):
        Path(name).write_text("question,answer\nq,a\n")
    Path("utf16.csv").write_text("question,answer\nq,a\n", encoding="utf-16")
    Path("wrong-columns.csv").write_text("title,body\nq,a\n")
    with pytest.raises(DataError, match=message):
        open_sources(make_config(path))


def test_a_hub_name_is_looked_up_where_no_file_has_it(
    write_jsonl: Write, make_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="cannot load the hub data set owner/name"):
        open_sources(make_config("owner/name"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_jsonl([ROW], "owner/name/rows.jsonl")
    assert [source.name for source in open_sources(make_config("owner/name"))] == ["rows.jsonl"]


def test_the_same_file_twice(write_jsonl: Write, tmp_path: Path) -> None:
    path = str(write_jsonl([ROW]))
    config = CacheConfig(teacher="t", out="o", data={"general": (path,)}, eval={"general": (str(tmp_path),)})
    with pytest.raises(DataError, match=r"rows\.jsonl is listed twice for domain 'general'"):
        open_sources(config)


def test_no_data_at_all() -> None:
    with pytest.raises(DataError, match="--data DOMAIN=PATH"):
        open_sources(CacheConfig(teacher="t", out="o", data={}))


def test_layout_comes_from_the_first_good_rows(tmp_path: Path, open_one: Callable[..., Source]) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('broken\n{"note": 1}\n{"question": "q"}\n{"answer": "a"}\n' + '{"text": "t"}\n' * 20)
    source = open_one(path)
    assert source.layout.prompt == "question"
    assert source.layout.response == "answer"
    assert len(source) == 24


def test_given_columns(tmp_path: Path, make_config: Configure) -> None:
    (tmp_path / "f.csv").write_text("title,body\nq,a\n")
    (tmp_path / "g.csv").write_text("question,answer\nq,a\n")
    config = make_config(tmp_path, columns={"prompt": "title", "response": "body"})
    assert [source.layout.prompt for source in open_sources(config)] == ["title", "question"]
    with pytest.raises(
        DataError, match=r"no data uses the column of --column prompt=heading.*g\.csv: question, answer"
    ):
        open_sources(make_config(tmp_path / "g.csv", columns={"prompt": "heading"}))
