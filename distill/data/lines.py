"""A text file flows in, compressed or not, and numbered lines flow out.

Nothing a file holds stops the reading: bytes that cannot be text, a line without end and a compressed stream that
breaks off become lines with a ``problem``. Memory stays within a few times ``LINE_LIMIT`` whatever the file unfolds to.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

LINE_LIMIT = 10_000_000  # bytes, without the line's end
COMPRESSIONS = (".gz", ".zst")

_BOM = b"\xef\xbb\xbf"
_SKIP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line and its end. ``text`` is None where the line could not be read at all, for the reason in ``problem``.

    Bytes that are not UTF-8 stand in ``text`` as surrogates, so that the structure around them can still be read.
    """

    number: int  # 1-based
    text: str | None
    end: str = ""  # "\n", "\r\n", or "" on a last line without one
    problem: str | None = None


def read_lines(path: Path) -> Iterator[Line]:
    r"""The lines of a file, split at ``\n`` and ``\r\n`` only (``str.splitlines`` also splits at U+2028 and \x85).

    Raises OSError when the disk fails; a damaged compressed stream is a line with a problem, and the last one.
    """
    with _open_bytes(path) as stream:
        for number in count(1):
            try:
                raw = stream.readline(LINE_LIMIT + 2)
                too_long = len(raw.rstrip(b"\r\n")) > LINE_LIMIT
                if too_long:
                    _skip_line(stream, raw)
            except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
                if getattr(error, "errno", None) is not None:
                    raise
                yield Line(number=number, text=None, problem=f"the compressed data breaks off: {error}")
                return
            if not raw:
                return
            if too_long:
                yield Line(number=number, text=None, problem=f"longer than {LINE_LIMIT:,} bytes")
            else:
                yield _decoded(raw.removeprefix(_BOM) if number == 1 else raw, number)


def _open_bytes(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        # Not zstandard's stream_reader: it takes a truncated file for a complete one.
        return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")))
    return path.open("rb")


def _skip_line(stream: BinaryIO, raw: bytes) -> None:
    while raw and not raw.endswith(b"\n"):
        raw = stream.readline(_SKIP_BYTES)


def _decoded(raw: bytes, number: int) -> Line:
    body = raw.removesuffix(b"\n")
    if len(body) < len(raw):
        body = body.removesuffix(b"\r")
    problem = "a NUL character" if b"\0" in body else None
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        text = body.decode("utf-8", "surrogateescape")
        problem = f"byte 0x{body[error.start]:02x} at byte {error.start + 1} of the line is not UTF-8"
    return Line(number=number, text=text, end=raw[len(body) :].decode("ascii"), problem=problem)
