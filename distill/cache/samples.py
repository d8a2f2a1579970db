"""Prompts with the teacher's own answers flow into ``samples.parquet``, one row each, and back.

    cache-teacher --samples N -> render_samples -> samples.parquet -> read_samples -> a student's answers beside them

The file is small, lies beside the shards, and is named with its SHA-256 in the manifest. See docs/format.md.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from distill.cache import pages, storage
from distill.cache.reader import CacheReader
from distill.cache.schema import list_of
from distill.errors import CorruptionError

SAMPLES_FILE = "samples.parquet"
_LARGEST = 64 * 2**20  # bytes that the file may unfold to
_RESTORE = "Restore it from a copy."


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and what the teacher answered, greedily: texts, and the tokens that it read and wrote.

    ``input_ids`` end where the answer begins; ``response_ids`` may end in the token that stopped it.
    """

    prompt_id: str
    domain: str
    prompt: str
    input_ids: tuple[int, ...]
    response: str
    response_ids: tuple[int, ...]


def samples_schema() -> pa.Schema:
    """The columns of ``samples.parquet``, in order. Nothing is ever null."""
    columns = [
        ("prompt_id", pa.string()),
        ("domain", pa.string()),
        ("prompt", pa.string()),
        ("input_ids", list_of(pa.int32())),
        ("response", pa.string()),
        ("response_ids", list_of(pa.int32())),
    ]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def render_samples(rows: Sequence[Sample]) -> bytes:
    """The file's bytes, the same for the same rows."""
    schema = samples_schema()
    columns = [pa.array([getattr(row, name) for row in rows], schema.field(name).type) for name in schema.names]
    buffer = io.BytesIO()
    table = pa.Table.from_arrays(columns, schema=schema)
    options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def read_samples(reader: CacheReader) -> list[Sample]:
    """The samples of an open cache, in the file's order; none where it has no such file.

    Of a sealed cache only the file that the manifest names is read. Raises CorruptionError when it is missing, is not
    the file that was sealed, has other columns or ids outside the vocabulary, or unfolds to more than 64 MiB.
    """
    where = f"{reader.root}/{SAMPLES_FILE}"
    sealed_sha256 = reader.files.get(SAMPLES_FILE)
    if reader.sealed and sealed_sha256 is None:
        return []
    try:
        data = storage.read(storage.inside(reader.root, SAMPLES_FILE))
    except FileNotFoundError as error:
        if not reader.sealed:
            return []
        raise CorruptionError(f"{where} is missing. {_RESTORE}") from error
    if sealed_sha256 is not None and hashlib.sha256(data).hexdigest() != sealed_sha256:
        raise CorruptionError(f"{where} is not the file that was sealed: its SHA-256 is another. {_RESTORE}")
    try:
        table = _table(data)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise CorruptionError(f"{where} cannot be read: {error}. {_RESTORE}") from error
    samples = [
        Sample(**{**row, "input_ids": tuple(row["input_ids"]), "response_ids": tuple(row["response_ids"])})
        for row in table.to_pylist()
    ]
    vocab_size = reader.identity.vocab_size
    if not all(row.input_ids and _within((*row.input_ids, *row.response_ids), vocab_size) for row in samples):
        raise CorruptionError(f"{where} has a prompt without tokens, or ids outside the vocabulary. {_RESTORE}")
    return samples


def _within(ids: Sequence[int], vocab_size: int) -> bool:
    return all(0 <= number < vocab_size for number in ids)


def _table(data: bytes) -> pa.Table:
    """Raises ValueError for what is not such a file, before anything is decompressed."""
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        if not file.schema_arrow.equals(samples_schema()):
            raise ValueError("its columns are not those of samples")
        sizes = pages.column_sizes(memoryview(data), file.metadata).values()
        if sum(size.num_bytes for size in sizes) > _LARGEST or any(size.has_dictionary for size in sizes):
            raise ValueError(f"it unfolds to more than {_LARGEST >> 20} MiB, or from a dictionary")
        return file.read(use_threads=False)
