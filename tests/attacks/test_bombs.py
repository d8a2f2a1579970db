"""What is small on the disk stays small in memory: bombs are refused before they unfold, measured in processes.

Every record vouches for its file. A command may grow by 64 MB; what the bombs would unfold to is many times that.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distill.cache.reader import CacheReader
from tests.attacks.forging import put_shard, replaced, rewrite, rewrite_commit, shard_of, sized
from tests.cache.conftest import fill, plan_of

ROOT = Path(__file__).parents[2]
LIMIT, GROWTH = 2**33, 64 * 10**6  # allocators reserve far more addresses than they use
UNFOLDED = 200_000_000


def first_table(cache: Path) -> tuple[CacheReader, pa.Table]:
    reader = CacheReader.open(cache)
    return reader, reader.read_unit(reader.commits[0])


def text_bomb(cache: Path) -> None:
    reader, table = first_table(cache)
    put_shard(cache, shard_of(replaced(table, "prompt", ["x" * UNFOLDED, "", "", ""]), reader))


def metadata_bomb(cache: Path) -> None:
    reader, table = first_table(cache)
    put_shard(cache, shard_of(replaced(table, "metadata", [[("k", "x" * UNFOLDED)], [], [], []]), reader))


def dictionary_bomb(cache: Path) -> None:
    """One long text that every row points to, with a record that declares it once."""
    reader, table = first_table(cache)
    rows = pa.concat_tables([table] * 50).combine_chunks()
    long = pa.DictionaryArray.from_arrays(pa.array([0] * len(rows), pa.int32()), pa.array(["x" * 4_000_000]))
    index = rows.schema.get_field_index("domain")
    content = shard_of(rows.set_column(index, rows.schema.field("domain"), long), reader, row_group_size=1000)
    counts = {
        name: {"train": 50 * getattr(reader.commits[0], name).total, "eval": 0}
        for name in ("num_rows", "num_targets", "num_trained")
    }
    put_shard(cache, content, num_decoded_bytes=10_000_000, **counts)


def list_bomb(cache: Path) -> None:
    reader, table = first_table(cache)
    lists = table.column("topk_ids").to_pylist()
    lists[0] = np.zeros(UNFOLDED // 8, np.int32)
    put_shard(cache, shard_of(replaced(table, "topk_ids", lists), reader))


def footer_bomb(cache: Path) -> None:
    reader, table = first_table(cache)
    wide = pa.table({f"column {i}": pa.array([1], pa.int8()) for i in range(8000)})
    put_shard(cache, shard_of(wide, reader))
    assert table.num_rows == 4


def claims(cache: Path) -> None:
    counts = {"train": 10**9, "eval": 0}
    rewrite_commit(cache, 0, num_rows=counts, num_targets=counts, num_trained=counts)


def large_claims(cache: Path) -> None:
    counts = {"train": 10**30, "eval": 0}
    sizes = {"num_bytes": 10**31, "num_decoded_bytes": 10**31}
    rewrite_commit(cache, 0, num_rows=counts, num_targets=counts, num_trained=counts, **sizes)


def claimed_units(cache: Path) -> None:
    """A plan of a billion units, as far as one may write it down: a list of one unit many times."""
    (cache / "manifest.json").unlink()
    rewrite(cache / "plan.json", lambda plan: plan.update(units=plan["units"][:1] * 20_000))


def wide_identity(cache: Path) -> None:
    rewrite(cache / "manifest.json", lambda m: m["identity"].update(top_k=10**9, vocab_size=10**10))


def sparse_manifest(cache: Path) -> None:
    sized(cache / "manifest.json", 10**12)


def sparse_projection(cache: Path) -> None:
    sized(cache / "projection.safetensors", 10**12)


def long_header(cache: Path) -> None:
    path = cache / "projection.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def deep_json(cache: Path) -> None:
    (cache / "manifest.json").write_text('{"format":' + "[" * 1_000_000)


BOMBS: dict[str, tuple[Callable[[Path], None], str]] = {
    "text": (text_bomb, "it unfolds to 200"),
    "metadata": (metadata_bomb, "it unfolds to 200"),
    "dictionary": (dictionary_bomb, "holds rows of another domain"),
    "list": (list_bomb, "it unfolds to"),
    "footer": (footer_bomb, "its footer has"),
    "a billion rows": (claims, "which no shard can hold"),
    "numbers beyond 64 bits": (large_claims, "which no shard can hold"),
    "a billion values a row": (wide_identity, "values, its record"),
    "sparse manifest": (sparse_manifest, "far larger than such a file ever is"),
    "sparse projection": (sparse_projection, "far larger than such a file ever is"),
    "safetensors header": (long_header, "projection.safetensors"),
    "deep JSON": (deep_json, "manifest.json is damaged"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, teacher: Any) -> dict[str, Any]:
    """How reading each bomb ended, and of data files; one process for all, since importing takes longest."""
    folder = tmp_path_factory.mktemp("bombs")
    commands: dict[str, list[str]] = {}
    for number, (name, (make, _)) in enumerate(BOMBS.items()):
        root = folder / str(number)
        fill(root, teacher, plan_of(teacher, rows={"general": 10, "medical": 6}))
        make(root)
        commands[name] = ["read", str(root)]
        commands[f"{name}, verify"] = ["verify", str(root), "--json"]
    root = folder / "units"
    fill(root, teacher, plan_of(teacher, rows={"general": 10}))
    claimed_units(root)
    commands["units"] = ["inspect", str(root)]
    for suffix, codec in (("zst", "zstd"), ("gz", "gzip")):
        path = folder / f"line.jsonl.{suffix}"
        with pa.CompressedOutputStream(str(path), codec) as stream:
            for _ in range(20):
                stream.write(b"x" * (UNFOLDED // 20))
            stream.write(b'\n{"text": "after it"}\n')
        commands[suffix] = ["rows", str(path)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("bounded.py")), str(LIMIT)],
        input=json.dumps(list(commands.values())),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(commands, lines, strict=True))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_does_not_unfold(outcomes: dict[str, Any], name: str) -> None:
    read, verified = outcomes[name], outcomes[f"{name}, verify"]
    assert read["code"] == 5, read
    assert BOMBS[name][1] in read["message"], read
    assert verified["code"] == 5, verified
    assert max(read["grown"], verified["grown"]) < GROWTH, (read, verified)


def test_many_units_are_only_counted(outcomes: dict[str, Any]) -> None:
    assert outcomes["units"]["code"] in (0, 3, 5), outcomes["units"]
    assert outcomes["units"]["grown"] < 3 * GROWTH


@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_a_compressed_line_without_end(outcomes: dict[str, Any], suffix: str) -> None:
    assert outcomes[suffix]["message"] == "longer than 10,000,000 bytes"
    assert outcomes[suffix]["grown"] < GROWTH
