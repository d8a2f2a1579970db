"""A cache and a query in SQL flow in, columns and rows flow out. DuckDB reads the shards where they lie.

    rows        one row for each sequence: every column of the shards, and ``row``, ``unit``, ``num_tokens``,
                ``num_trained``, ``mean_entropy`` (of trained targets, in nats)
    tokens      one row for each target: ``row``, ``position``, ``token_id``, ``next_id``, ``trained``, ``entropy``,
                ``top1_id``, ``top1_prob``, ``next_rank`` and ``next_logprob`` (null where the next token is not in the
                top-k), ``tail_mass_<T>``
    vocabulary  ``token_id``, ``text``
    rejects     ``domain``, ``source``, ``reason`` of input rows that became no sequence

Only shards that a commit record names are read, and only at the size it names; their hashes are left to ``verify``.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from distill.cache import storage
from distill.cache.reader import CacheReader
from distill.errors import CorruptionError, DataError, DistillError, UsageError
from distill.report.extras import open_tokenizer, read_rejects

if TYPE_CHECKING:
    import duckdb

VIEWS = ("rows", "tokens", "vocabulary", "rejects")
_REJECT = ("domain", "source", "reason")
_FETCHED = 4096  # rows that leave DuckDB at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Names of the columns, and the rows, once: they are fetched as they are asked for."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


def query(path: str | Path, sql: str) -> Answer:
    """What ``sql`` says about the cache at ``path``, sealed or not.

    Raises UsageError when DuckDB is not installed or refuses the query, DataError when there is nothing to ask,
    CorruptionError when a shard is not there as it was committed.
    """
    try:
        import duckdb
    except ImportError as error:
        raise UsageError(
            "`distill sql` needs DuckDB, which is not installed. Run `pip install 'distill[sql]'`."
        ) from error
    reader = CacheReader.open(path, allow_incomplete=True)
    if not reader.commits:
        raise DataError(f"{reader.root} has no committed unit yet. Run `distill cache-teacher` first.")
    # No extension is fetched from the network behind the user's back.
    connection = duckdb.connect(config={"autoinstall_known_extensions": False})
    _define_views(connection, reader)
    if "vocabulary" in sql.lower():
        connection.register("vocabulary", _vocabulary(reader))
    connection.register("rejects", _rejects(reader))
    try:
        connection.execute(sql)
        columns = tuple(str(column[0]) for column in connection.description or ())
    except duckdb.Error as error:
        raise _explained(error, reader) from error
    return Answer(columns=columns, rows=_fetch(connection, reader))


def plain(value: Any) -> Any:
    """A value that JSON can hold: no decimals, no dates, and null for what is no number."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _fetch(connection: "duckdb.DuckDBPyConnection", reader: CacheReader) -> Iterator[tuple[Any, ...]]:
    import duckdb

    while True:
        try:
            rows = connection.fetchmany(_FETCHED)
        except duckdb.Error as error:
            raise _explained(error, reader) from error
        if not rows:
            return
        yield from rows


def _explained(error: Exception, reader: CacheReader) -> DistillError:
    text = str(error).strip()
    if any(commit.nonce in text for commit in reader.commits):  # of a shard's name
        return CorruptionError(f"{text}. Run `distill verify {reader.root}` for a list of all that is wrong.")
    return UsageError(
        f"DuckDB refuses the query: {text}\nThe views are {', '.join(VIEWS)}; `describe tokens` lists the columns of "
        "one, docs/ten-questions.md has examples."
    )


def _define_views(connection: "duckdb.DuckDBPyConnection", reader: CacheReader) -> None:
    connection.register("units", _units(reader))
    # A statement that defines a view takes no parameters, hence the quoting.
    shards = ", ".join("'" + path.replace("'", "''") + "'" for path in _shards(reader))
    connection.execute(f"""create view rows as
        select first_row + file_row_number as row, unit, * exclude (first_row, unit, filename, file_row_number),
            len(input_ids) as num_tokens,
            list_count(list_filter(loss_mask, lambda trained: trained)) as num_trained,
            list_avg(list_where(entropy, loss_mask)) as mean_entropy
        from read_parquet([{shards}], filename = true, file_row_number = true) join units using (filename)""")
    connection.execute(_ranks(reader.top_k))
    connection.execute(_tokens(reader.top_k, reader.temperatures))


def _ranks(top_k: int) -> str:
    """Where the true next token stands in the top-k. Unrolled whole: twenty-five times as fast as slices of lists."""
    return f"""create view ranks as
        select row, i // {top_k} as position, any_value(i % {top_k} + 1) as next_rank,
            any_value(logprob) as next_logprob
        from (select row, unnest(topk_ids) as id, unnest(topk_logprobs) as logprob, unnest(range(len(topk_ids))) as i,
                unnest(list_transform(range(len(topk_ids)), lambda i: input_ids[i // {top_k} + 2])) as next_id
            from rows)
        where id = next_id group by row, i // {top_k}"""


def _tokens(top_k: int, temperatures: tuple[float, ...]) -> str:
    num = len(temperatures)
    tails = "".join(
        f", exp(log_tail[position * {num} + {index}]) as {tail_column(temperature)}"
        for index, temperature in enumerate(temperatures, 1)
    )
    return f"""create view tokens as
        select targets.*, next_rank, next_logprob
        from (select row, sequence_id, domain, split, position, input_ids[position + 1] as token_id,
                input_ids[position + 2] as next_id, loss_mask[position + 1] as trained,
                entropy[position + 1] as entropy, topk_ids[position * {top_k} + 1] as top1_id,
                exp(topk_logprobs[position * {top_k} + 1]) as top1_prob{tails}
            from (select *, unnest(range(len(loss_mask))) as position from rows)) as targets
        left join ranks using (row, position)"""


def tail_column(temperature: float) -> str:
    """``tail_mass_4`` at 4, ``tail_mass_1_5`` at 1.5: a name that needs no quotes."""
    return f"tail_mass_{temperature:g}".replace(".", "_").replace("-", "_").replace("+", "_")


def _shards(reader: CacheReader) -> list[str]:
    paths = []
    for commit in reader.commits:
        path = storage.inside(reader.root, commit.shard)
        if not path.is_file() or path.stat().st_size != commit.num_bytes:
            raise CorruptionError(
                f"unit {commit.unit}: {path} is missing or not as long as it was committed. Run `distill verify "
                f"{reader.root}` for a list of all that is wrong."
            )
        paths.append(str(path))
    return paths


def _units(reader: CacheReader) -> pa.Table:
    counts = [commit.num_rows.total for commit in reader.commits]
    return pa.table(
        {
            "filename": _shards(reader),
            "unit": [commit.unit for commit in reader.commits],
            "first_row": pa.array([sum(counts[:index]) for index in range(len(counts))], pa.int64()),
        }
    )


def _vocabulary(reader: CacheReader) -> pa.Table:
    tokenizer = open_tokenizer(reader)
    if tokenizer is None:
        raise DataError(f"{reader.root} has no teacher/tokenizer.json, so there is no view 'vocabulary'.")
    ids = range(reader.identity.vocab_size)
    texts = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in ids]
    return pa.table({"token_id": pa.array(ids, pa.int32()), "text": pa.array(texts, pa.string())})


def _rejects(reader: CacheReader) -> pa.Table:
    rejects = [asdict(reject) for reject in read_rejects(reader)]
    return pa.Table.from_pylist(rejects, schema=pa.schema([(name, pa.string()) for name in _REJECT]))
