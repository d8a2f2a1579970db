"""Models flow in, JSON files with a checksum flow out, and back: one flipped bit anywhere in such a file is noticed.

The last member of the object is ``checksum``, the SHA-256 of all bytes before the comma that precedes it. So a file
stays plain JSON for every tool, and a reader need not write it again in some canonical form to check it.
"""

import hashlib
import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from distill.cache import storage
from distill.errors import CorruptionError

Model = TypeVar("Model", bound=BaseModel)
_SEAM = b',\n  "checksum": "'
_END = b'"\n}\n'


def render(record: BaseModel) -> bytes:
    """The record as an indented JSON object whose last member is its checksum."""
    body = (
        json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False)
        .encode("utf-8", "replace")
        .removesuffix(b"\n}")
    )
    return body + _SEAM + hashlib.sha256(body).hexdigest().encode() + _END


def parse(model: type[Model], data: bytes, *, path: Path | str, fix: str) -> Model:
    """The record in ``data``. Raises CorruptionError that names ``path`` and says ``fix``."""
    body, seam, rest = data.rpartition(_SEAM)
    if not seam or rest != hashlib.sha256(body).hexdigest().encode() + _END:
        raise CorruptionError(f"{path} is damaged: its content does not have its checksum. {fix}")
    try:
        return model.model_validate_json(body + b"\n}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptionError(f"{path} is not a {model.__name__.lower()}: '{where}': {first['msg']}. {fix}") from error


def load(model: type[Model], root: storage.Root, name: str, *, fix: str) -> Model:
    """The record ``name`` of a cache. Raises FileNotFoundError where there is none, and as ``parse`` does."""
    return parse(model, storage.read(storage.inside(root, name)), path=f"{root}/{name}", fix=fix)
