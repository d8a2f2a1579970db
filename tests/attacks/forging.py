"""A sound cache or checkpoint flows in, one that lies flows out: checksums and hashes are right again.

An attacker can compute a checksum as well as we can. So whatever is changed here is vouched for by the records, and
what must refuse it is the reader itself.
"""

import hashlib
import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from distill.__main__ import app
from distill.cache import document
from distill.cache.plan import Manifest
from distill.cache.reader import CacheReader
from distill.cache.schema import parquet_options
from distill.errors import DistillError
from distill.student.checkpoint import STATE

_SEAM, _END = b',\n  "checksum": "', b'"\n}\n'


def signed(text: str | bytes) -> bytes:
    """A JSON object, given as text, with the checksum that makes it a record."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    body = data.rstrip().removesuffix(b"}").rstrip()
    return body + _SEAM + hashlib.sha256(body).hexdigest().encode() + _END


def unsigned(data: bytes) -> Any:
    """What a record says, as plain JSON without its checksum."""
    content = json.loads(data)
    content.pop("checksum")
    return content


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a record says; ``change`` works on its JSON in place."""
    content = unsigned(path.read_bytes())
    change(content)
    path.write_bytes(signed(json.dumps(content, indent=2, ensure_ascii=False)))


def rewrite_commit(cache: Path, number: int, **changes: object) -> None:
    """Change a commit record of a sealed cache, and the manifest with it."""
    rewrite(cache / "manifest.json", lambda manifest: manifest["commits"][number].update(changes))
    unit = unsigned((cache / "manifest.json").read_bytes())["commits"][number]["unit"]
    rewrite(cache / "commits" / f"{unit}.json", lambda commit: commit.update(changes))


def put_shard(cache: Path, content: bytes, **changes: object) -> CacheReader:
    """Make ``content`` the first shard, with a record that vouches for its hash and size."""
    path = cache / "manifest.json"
    commit = document.parse(Manifest, path.read_bytes(), path=path, fix="").commits[0]
    (cache / commit.shard).write_bytes(content)
    sizes = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
    rewrite_commit(cache, 0, **sizes, **changes)
    return CacheReader.open(cache)


def shard_of(table: pa.Table, reader: CacheReader, **options: Any) -> bytes:
    """A Parquet file as the cache writes it, but for ``options``."""
    file = BytesIO()
    pq.write_table(table, file, **{"row_group_size": 3, **parquet_options(reader.layout), **options})
    return file.getvalue()


def replaced(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """The table with other values in one column."""
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def vouch(checkpoint: Path) -> None:
    """Let a checkpoint's state record what lies in its folder now."""
    files = {
        path.relative_to(checkpoint).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "num_bytes": path.stat().st_size,
        }
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != STATE
    }
    rewrite(checkpoint / STATE, lambda state: state.update(files=files))


def refused(*arguments: object, code: int = 5) -> str:
    """The one paragraph with which a command refuses, exiting with ``code``."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = done.exception
    assert isinstance(error, DistillError), (done.exit_code, done.output, repr(error))
    assert error.exit_code == code, str(error)
    assert "\n" not in str(error).strip(), str(error)
    assert all(character.isprintable() for character in str(error)), str(error)
    return str(error)


def sized(path: Path, num_bytes: int) -> None:
    """A file of zeros that takes no room on the disk."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), num_bytes)
