"""Models flow in, JSON files with a checksum flow out, and back: one flipped bit anywhere in such a file is noticed.

The last member of the object is ``checksum``, the SHA-256 of all bytes before the comma that precedes it. So a file
stays plain JSON for every tool, and a reader need not write it again in some canonical form to check it.
"""

import hashlib
import json
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from distill.cache import storage
from distill.errors import CorruptionError

Model = TypeVar("Model")
_SEAM = b',\n  "checksum": "'
_END = b'"\n}\n'


def render(record: object) -> bytes:
    """The record as an indented JSON object whose last member is its checksum."""
    body = _json(record).removesuffix(b"\n}")
    return b"".join((body, _SEAM, hashlib.sha256(body).hexdigest().encode(), _END))


def parse(model: type[Model], data: bytes, *, path: Path | str, fix: str) -> Model:
    """The record in ``data``. Raises CorruptionError that names ``path`` and says ``fix``."""
    return validated(model, data[: checked(data, path=path, fix=fix)] + b"\n}", path=path, fix=fix)


def checked(data: bytes, *, path: Path | str, fix: str) -> int:
    """Length of what the checksum of ``data`` covers. Raises CorruptionError when it is wrong or missing."""
    length = max(data.rfind(_SEAM), 0)
    if data[length:] != _SEAM + hashlib.sha256(memoryview(data)[:length]).hexdigest().encode() + _END:
        raise CorruptionError(f"{path} is damaged: its content does not have its checksum. {fix}")
    return length


def validated(model: type[Model], data: bytes, *, path: Path | str, fix: str) -> Model:
    """The model in a JSON text. Raises CorruptionError when it is another or none."""
    try:
        return cast(Model, _adapter(cast(Hashable, model)).validate_json(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        name = getattr(model, "__name__", str(model)).lower()
        raise CorruptionError(f"{path} is not a {name}: '{where}': {first['msg']}. {fix}") from error


def load(model: type[Model], root: storage.Root, name: str, *, fix: str) -> Model:
    """The record ``name`` of a cache. Raises FileNotFoundError where there is none, and as ``parse`` does."""
    return parse(model, storage.read(storage.inside(root, name)), path=f"{root}/{name}", fix=fix)


@lru_cache
def _adapter(model: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, model))


def _json(record: object) -> bytes:
    adapter = _adapter(cast(Hashable, type(record)))
    try:
        return adapter.dump_json(record, indent=2)
    except PydanticSerializationError:  # a path that is not UTF-8
        plain = json.dumps(adapter.dump_python(record, mode="json"), indent=2, ensure_ascii=False)
        return plain.encode("utf-8", "replace")
