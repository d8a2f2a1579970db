"""A cache flows in, what it holds beside its shards flows out: the teacher's tokenizer, the rejected rows."""

import json
from typing import TYPE_CHECKING

from distill.cache import storage
from distill.cache.reader import CacheReader
from distill.errors import CorruptionError
from distill.records import Reject

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def open_tokenizer(reader: CacheReader) -> "Tokenizer | None":
    """The teacher's tokenizer; None where the cache holds none. Raises CorruptionError when it is damaged."""
    from tokenizers import Tokenizer

    path = storage.inside(reader.root, "teacher/tokenizer.json")
    if not path.exists():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CorruptionError(f"{path} is no tokenizer: {error}. Restore it from a copy.") from error


def read_rejects(reader: CacheReader) -> list[Reject]:
    """Every rejected input row, in order of units. Raises CorruptionError when a file of them is damaged."""
    rejects = []
    for commit in reader.commits:
        if commit.rejects is None:
            continue
        path = storage.inside(reader.root, commit.rejects)
        try:
            rejects += [Reject(**json.loads(line)) for line in storage.read(path).splitlines()]
        except (FileNotFoundError, ValueError, TypeError, RecursionError) as error:
            raise CorruptionError(
                f"unit {commit.unit}: {path} cannot be read: {error}. Run `distill verify {reader.root}` for a list of "
                "all that is wrong."
            ) from error
    return rejects
