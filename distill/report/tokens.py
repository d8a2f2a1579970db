"""A cache, or a run's ``tokens.json``, flows in; a few sequences with what was expected at each token flow out."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from distill.cache import storage
from distill.cache.reader import CacheReader
from distill.cache.views import Decode, Record, held_out_rows, view_of, window_of
from distill.errors import CorruptionError
from distill.records import SequenceTargets
from distill.report.curves import stage_folders
from distill.report.extras import open_tokenizer
from distill.report.viewer import View

TOKENS_FILE = "tokens.json"
_PER_DOMAIN = 2
_MOST = 12  # sequences of a cache
_NUM_TOKENS = 64


def cache_views(reader: CacheReader) -> tuple[View, ...]:
    """The teacher's expectations at some held-out sequences of each domain; of train rows where none is held out."""
    tokenizer = open_tokenizer(reader)
    decode: Decode = partial(tokenizer.decode, skip_special_tokens=False) if tokenizer else _ids
    rows = [row for domain in reader.domains for row in islice(held_out_rows(reader, domain), _PER_DOMAIN)]
    kind = "held-out"
    if not rows:
        kind = "train"
        rows = [row for domain in reader.domains for row in islice(_train_rows(reader, domain), _PER_DOMAIN)]
    if not rows:
        return ()
    sequences = [view_of(row, window_of(row, num_tokens=_NUM_TOKENS), decode) for row in rows[:_MOST]]
    caption = "At T=1, as the cache holds it: the likeliest tokens, the others of the top-k, and the mass of the tail."
    return (View(title=f"The teacher on {kind} sequences", caption=caption, sequences=tuple(sequences)),)


def run_views(run: Path) -> tuple[View, ...]:
    """What teacher and student expect after each stage, the last one first; nothing where a run kept no record.

    Raises CorruptionError when a record is damaged.
    """
    found = [(folder, record) for folder in stage_folders(run) if (record := _record(folder / TOKENS_FILE)) is not None]
    return tuple(
        View(
            title=f"Teacher and student, {folder.name}, step {record.step:,}",
            caption="Held-out sequences, at T=1.",
            sequences=record.sequences,
            is_open=number == 0,
        )
        for number, (folder, record) in enumerate(reversed(found))
    )


def _record(path: Path) -> Record | None:
    if not path.is_file():
        return None
    try:
        return TypeAdapter(Record).validate_json(storage.read(path))
    except ValidationError as error:
        problem = error.errors()[0]
        raise CorruptionError(
            f"{path} is no record of tokens: {problem['msg']} at {'.'.join(map(str, problem['loc'])) or 'its start'}. "
            "Delete it, and the report goes without; the next evaluation of the stage writes it anew."
        ) from error


def _train_rows(reader: CacheReader, domain: str) -> Iterator[SequenceTargets]:
    for commit in reader.units(domain):
        yield from (row for row in reader.sequences(commit, "train") if row.prompt.loss_mask.any())


def _ids(ids: list[int]) -> str:
    return " ".join(map(str, ids))
