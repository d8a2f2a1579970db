"""A student's tokenizer and a cache flow in; the tokenizer flows out where both mean the same by every id."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.cache.identity import token_map_hash
from distill.cache.reader import CacheReader
from distill.errors import IdentityError, UsageError

_EXAMPLES = 3


def matching_tokenizer(folder: str, reader: CacheReader, *, trust_remote_code: bool) -> Any:
    """The tokenizer at ``folder`` (or hub name), whose token -> id map is that of the cache's teacher.

    No weights are read. Raises IdentityError when the maps differ, UsageError when there is no tokenizer.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    token_map: dict[str, int] = tokenizer.get_vocab()
    if token_map_hash(token_map) == reader.identity.token_map:
        return tokenizer
    raise IdentityError(
        f"the tokenizer of {folder} is not the one that the cache {reader.root} was made with: "
        f"{_difference(token_map, reader.teacher_dir)}. Cached ids would mean other tokens to this student. An equal "
        "vocabulary size proves nothing; the token -> id map must be equal. Use a student of the teacher's family, or "
        "make a cache from a teacher that shares the student's tokenizer."
    )


def load_tokenizer(folder: str, *, trust_remote_code: bool) -> Any:
    """The tokenizer at ``folder`` (or hub name). Raises UsageError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise nearly everything
        reason = str(error).partition("\n")[0].rstrip(". ")
        raise UsageError(
            f"cannot load a tokenizer from {folder}: {reason}. --student needs a model folder or hub name with its "
            "tokenizer files."
        ) from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer. Raises OSError where the disk refuses, as other files do."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the library, which is no Python, knows no other
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error


def _difference(student: Mapping[str, int], teacher_dir: Path) -> str:
    """What differs, for a person. The teacher's map is read from the tokenizer.json that it left in the cache."""
    from tokenizers import Tokenizer

    size = f"it has {len(student)} tokens"
    try:
        teacher: dict[str, int] = Tokenizer.from_file(str(teacher_dir / "tokenizer.json")).get_vocab()
    except Exception:  # all that the library raises for a missing or damaged file; the refusal stands without it
        return f"{size}, and the hashes of the maps differ"
    parts = [f"{size}, the teacher's {len(teacher)}"]
    moved = sorted((number, token) for token, number in teacher.items() if student.get(token, number) != number)
    if moved:
        examples = ", ".join(
            f"{token!r} is {number} there, {student[token]} here" for number, token in moved[:_EXAMPLES]
        )
        parts.append(f"{len(moved)} tokens have another id ({examples})")
    for words, ours, theirs in (("only here", student, teacher), ("only there", teacher, student)):
        alone = sorted(token for token in ours if token not in theirs)
        if alone:
            parts.append(f"{len(alone)} are {words} ({', '.join(map(repr, alone[:_EXAMPLES]))})")
    return "; ".join(parts)
