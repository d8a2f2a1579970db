"""Every row of a CSV, JSON-lines or Parquet file comes out once: its fields, or the line and the reason for none."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.formats import RawRow, reader_of
from distill.data.lines import LINE_LIMIT


def rows_of(path: Path, content: bytes | str = b"") -> list[RawRow]:
    if content:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    reader = reader_of(path)
    assert reader is not None
    rows: Iterator[RawRow] = reader(path)
    return list(rows)


def problems(rows: list[RawRow]) -> dict[int, str]:
    return {row.row: row.problem for row in rows if row.problem is not None}


@pytest.mark.parametrize(
    "name", ["a.csv", "A.CSV", "a.csv.gz", "a.csv.zst", "a.jsonl", "a.json", "a.json.gz", "a.jsonl.zst", "a.parquet"]
)
def test_known_extensions(name: str) -> None:
    assert reader_of(Path(name)) is not None


@pytest.mark.parametrize("name", ["a.txt", "a", "a.gz", "a.csv.bz2", "csv", "a.parquet.gz"])
def test_unknown_extensions(name: str) -> None:
    assert reader_of(Path(name)) is None


def test_jsonl_rejects_are_line_precise(tmp_path: Path) -> None:
    content = "\n".join(
        [
            '\ufeff{"text": "first"}',
            "",
            '{"text": "broken',
            '{"text": "a\u2028b\x85c"}',
            '["a list"]',
            '{"text": "\\ud83d alone"}',
            '{"text": "\\ud83d\\ude00 a pair"}',
            '{"text": "\\u0000"}',
            '{"text": "the six characters \\\\u0000"}',
            '{"text": NaN}',
            "[" * 100_000,
            '{"text": ' + "9" * 5_000 + "}",
            "\u2028",
            '{"text": "last"}',
        ]
    )
    rows = rows_of(tmp_path / "f.jsonl", content)
    good = {row.row: row.fields["text"] for row in rows if row.fields is not None}
    assert good == {1: "first", 4: "a\u2028b\x85c", 7: "😀 a pair", 9: "the six characters \\u0000", 14: "last"}
    found = problems(rows)
    assert list(found) == [3, 5, 6, 8, 10, 11, 12, 13]
    assert found[3].startswith("not JSON: Unterminated string")
    assert found[5] == "a JSON list, not an object with columns"
    assert found[6] == "a lone surrogate (U+D83D)"
    assert found[8] == "a NUL character"
    assert found[10] == "not JSON: NaN is no JSON number"
    assert found[11] == "nested too deeply"
    assert "digits" in found[12]


def test_jsonl_bytes_that_are_no_text(tmp_path: Path) -> None:
    rows = rows_of(
        tmp_path / "f.jsonl", b'{"text": "a"}\n{"text": "\xed\xa0\x80"}\n{"text": "\x00"}\n{"text": "b"}\r\n'
    )
    assert list(problems(rows)) == [2, 3]
    assert rows[3].fields == {"text": "b"}


def test_long_line_is_one_problem(tmp_path: Path) -> None:
    line = b'{"text": "' + b"x" * LINE_LIMIT + b'"}\n'
    rows = rows_of(tmp_path / "f.jsonl.gz", gzip.compress(b'{"text": "a"}\n' + line + b'{"text": "b"}\n', 1))
    assert problems(rows) == {2: "longer than 10,000,000 bytes"}
    assert [row.row for row in rows] == [1, 2, 3]


def test_csv_quoted_newlines_and_counts(tmp_path: Path) -> None:
    content = (
        "\ufeffquestion, answer\r\nq1,a1\r\n" + '"q2\r\n\nmore","say ""a2"""\r\n' + "q3\r\nq4,a4,extra\r\n\r\nq5,\r\n"
    )
    rows = rows_of(tmp_path / "f.csv", content)
    assert [(row.row, row.fields) for row in rows if row.fields is not None] == [
        (2, {"question": "q1", "answer": "a1"}),
        (3, {"question": "q2\r\n\nmore", "answer": 'say "a2"'}),
        (9, {"question": "q5", "answer": ""}),
    ]
    assert problems(rows) == {6: "1 fields, the header has 2", 7: "more fields than the header's 2"}


def test_csv_stray_quote_costs_one_row(tmp_path: Path) -> None:
    content = 'a,b\n1,"open\n2,x\n3,y\n4,"z"\n5,6" wide\n"7"8,w\n9,v\n'
    rows = rows_of(tmp_path / "f.csv", content)
    assert problems(rows) == {2: "text after a closing quote", 7: "text after a closing quote"}
    assert [row.fields["a"] for row in rows if row.fields is not None] == ["2", "3", "4", "5", "9"]
    assert rows[4].fields == {"a": "5", "b": '6" wide'}


def test_csv_quote_that_is_never_closed(tmp_path: Path) -> None:
    lines = "".join(f"{number},{'x' * 2_000}\n" for number in range(5_500))
    rows = rows_of(tmp_path / "f.csv", 'a,b\n1,"open\n' + lines)
    assert problems(rows) == {2: "a quote is not closed within 10,000,000 characters"}
    assert len(rows) == 5_501
    assert problems(rows_of(tmp_path / "g.csv", 'a,b\n1,"open\n2,x')) == {2: "a quote is never closed"}


def test_csv_bytes_that_are_no_text(tmp_path: Path) -> None:
    content = b'a,b\n1,\xff\n2,"x\n\x00y"\n3,"z\n' + b"x" * (LINE_LIMIT + 1) + b'\n4,w\n"\xfe\n",v\n5,u\n'
    rows = rows_of(tmp_path / "f.csv", content)
    assert problems(rows) == {
        2: "byte 0xff at byte 3 of the line is not UTF-8",
        3: "a NUL character",
        5: "longer than 10,000,000 bytes",
        6: "longer than 10,000,000 bytes",
        8: "byte 0xfe at byte 2 of the line is not UTF-8",
    }
    assert [row.row for row in rows if row.fields is not None] == [7, 10]


@pytest.mark.parametrize("header", ["a,a", "a,", '"a', "a\x00,b"])
def test_csv_header_that_cannot_be_read(tmp_path: Path, header: str) -> None:
    (row,) = rows_of(tmp_path / "f.csv", header + "\n1,2\n3,4\n")
    assert row.row == 1
    assert row.problem is not None
    assert row.problem.startswith("the header cannot be read: ")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.text(st.sampled_from('ab ",\n\r\u2028\x85é')), min_size=2, max_size=2),
        max_size=6,
    ),
    st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]),
)
def test_csv_reads_what_the_standard_library_writes(
    tmp_path_factory: pytest.TempPathFactory, records: list[list[str]], dialect: tuple[str, int]
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=dialect[0], quoting=dialect[1])
    writer.writerows([["a", "b"], *records])
    rows = rows_of(tmp_path_factory.mktemp("csv") / "f.csv", text.getvalue())
    assert [list((row.fields or {}).values()) for row in rows] == records


def test_parquet_values_become_json(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a", None],
            "count": [1, 2],
            "price": [Decimal("1.50"), None],
            "raw": [b"bytes", b"\xff"],
            "messages": [[{"role": "user", "content": "hi"}], []],
        }
    )
    pq.write_table(table, tmp_path / "f.parquet")
    rows = rows_of(tmp_path / "f.parquet")
    assert rows[0].row == 0
    assert rows[0].fields == {
        "text": "a",
        "count": 1,
        "price": "1.50",
        "raw": "bytes",
        "messages": [{"role": "user", "content": "hi"}],
    }
    assert problems(rows) == {1: "a binary value that is not UTF-8 text"}


def test_keys_that_a_parquet_struct_lacks_are_not_made_up(tmp_path: Path) -> None:
    """Arrow gives every tool call the arguments of all others; a template would print them as null."""
    calls = [[{"name": "clock", "arguments": {"zone": "UTC"}}], [{"name": "sum", "arguments": {"of": [1, None]}}]]
    pq.write_table(pa.table({"calls": calls}), tmp_path / "f.parquet")
    rows = rows_of(tmp_path / "f.parquet")
    assert [row.fields for row in rows] == [{"calls": call} for call in calls]


def test_parquet_text_that_is_no_text(tmp_path: Path) -> None:
    broken = pa.array([b"a", b"\xff", b"b\x00", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "f.parquet")
    rows = rows_of(tmp_path / "f.parquet")
    assert problems(rows) == {1: "text that is not UTF-8", 2: "a NUL character"}
    assert len(rows) == 4


def test_damaged_parquet_accounts_for_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    table = pa.table({"text": [f"{number} " * 50 for number in range(3_000)]})
    pq.write_table(
        table, path, row_group_size=1_024, write_page_checksum=True, use_dictionary=False, compression="none"
    )
    content = bytearray(path.read_bytes())
    second = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = second.data_page_offset + second.total_compressed_size // 2
    content[start] ^= 1  # in the middle of a text: only the checksum can tell
    path.write_bytes(content)
    rows = rows_of(path)
    assert [row.row for row in rows] == list(range(3_000))
    assert [row.row for row in rows if row.fields is not None] == list(range(1_024))
    path.write_bytes(b"PAR1 not really")
    assert len(problems(rows_of(path))) == 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_mangled_jsonl_accounts_for_every_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray("".join(json.dumps({"text": f"row {n} é"}) + "\n" for n in range(6)).encode())
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(content) - 1))
        mangled = data.draw(st.sampled_from([b"", b"\n", b"\r", b"\x00", b"\xff", b'"', b"\\ud800", "\u2028".encode()]))
        content[position : position + data.draw(st.integers(0, 3))] = mangled
    rows = rows_of(tmp_path_factory.mktemp("jsonl") / "f.jsonl", bytes(content) or b"\n")
    lines = [number for number, line in enumerate(content.split(b"\n"), start=1) if line.strip(b" \t\r")]
    assert [row.row for row in rows] == lines
    assert all((row.fields is None) != (row.problem is None) for row in rows)
