"""Lines keep their numbers and their text whatever the bytes, and no file can exhaust memory or stop the reading."""

import gzip
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from distill.data.lines import LINE_LIMIT, read_lines


def write(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(content)
    return path


def test_splits_at_newlines_only(tmp_path: Path) -> None:
    content = "a\u2028b\x85c\x0bd\re\r\nsecond\n\nlast".encode()
    lines = list(read_lines(write(tmp_path / "f.jsonl", content)))
    assert [(line.number, line.text, line.end) for line in lines] == [
        (1, "a\u2028b\x85c\x0bd\re", "\r\n"),
        (2, "second", "\n"),
        (3, "", "\n"),
        (4, "last", ""),
    ]
    assert not any(line.problem for line in lines)


def test_byte_order_mark_is_dropped_from_the_first_line_only(tmp_path: Path) -> None:
    lines = list(read_lines(write(tmp_path / "f.csv", "\ufeffa\n\ufeffb\n".encode())))
    assert [line.text for line in lines] == ["a", "\ufeffb"]


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    lines = list(read_lines(write(tmp_path / "f.csv", b"good\nab\xffc\na\x00b\ngood\n")))
    assert [line.problem for line in lines] == [
        None,
        "byte 0xff at byte 3 of the line is not UTF-8",
        "a NUL character",
        None,
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_line_limit(tmp_path: Path, suffix: str) -> None:
    longest = b"x" * LINE_LIMIT
    content = b"first\n" + longest + b"\r\n" + longest + b"y\n" + longest * 3 + b"\nlast"
    lines = list(read_lines(write(tmp_path / f"f.jsonl{suffix}", content)))
    assert [(line.number, line.text and len(line.text)) for line in lines] == [
        (1, 5),
        (2, LINE_LIMIT),
        (3, None),
        (4, None),
        (5, 4),
    ]
    assert lines[2].problem == "longer than 10,000,000 bytes"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_does_not_exhaust_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb.jsonl{suffix}"
    block = b"0" * (1 << 24)
    with pa.CompressedOutputStream(str(path), "gzip" if suffix == ".gz" else "zstd") as stream:
        for _ in range(16):
            stream.write(block)
        stream.write(b"\nlast\n")
    assert path.stat().st_size < 2_000_000
    arrow_before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        lines = list(read_lines(path))
        peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - arrow_before
    finally:
        tracemalloc.stop()
    assert [line.text for line in lines] == [None, "last"]
    assert peak < 4 * LINE_LIMIT


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbage after"])
def test_damaged_stream_is_a_last_line_with_a_problem(tmp_path: Path, suffix: str, damage: str) -> None:
    lines = b"".join(b"line %d\n" % (number * number) for number in range(20_000))
    path = write(tmp_path / f"f.jsonl{suffix}", lines)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content + b"garbage")
    read = list(read_lines(path))
    assert len(read) > 5_000
    assert [line.text for line in read[:-1]] == [f"line {number * number}" for number in range(len(read) - 1)]
    assert read[-1].text is None
    assert read[-1].problem is not None
    assert read[-1].problem.startswith("the compressed data breaks off: ")


def test_several_members_and_frames_are_one_text(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        parts = [write(tmp_path / f"{part}{suffix}", part.encode()).read_bytes() for part in ("a\nb", "c\nd\n")]
        path = tmp_path / f"f.jsonl{suffix}"
        path.write_bytes(b"".join(parts))
        assert [line.text for line in read_lines(path)] == ["a", "bc", "d"]
