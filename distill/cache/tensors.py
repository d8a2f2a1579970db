"""Named arrays and string metadata flow in, safetensors bytes flow out, the same bytes for the same content; and back.

The safetensors library orders metadata by a random hash seed. Files here are known by their SHA-256, so the header is
written again with sorted metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from distill.cache import storage
from distill.errors import CorruptionError

_LENGTH_BYTES = 8  # a safetensors file opens with the length of its JSON header, 64 bits little endian


def dump(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """The arrays as safetensors bytes; equal content gives equal bytes."""
    plain = safetensors.numpy.save({name: np.ascontiguousarray(values) for name, values in arrays.items()})
    length = int.from_bytes(plain[:_LENGTH_BYTES], "little")
    header = json.loads(plain[_LENGTH_BYTES : _LENGTH_BYTES + length])
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":"))
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % 8)  # data stays aligned
    return b"".join(
        (len(encoded).to_bytes(_LENGTH_BYTES, "little"), encoded, memoryview(plain)[_LENGTH_BYTES + length :])
    )


def load(data: bytes, *, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Arrays and metadata of safetensors bytes.

    Raises CorruptionError when ``data``, which ``name`` names in the message, is no safetensors file.
    """
    try:
        arrays = safetensors.numpy.load(data)
        length = int.from_bytes(data[:_LENGTH_BYTES], "little")
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CorruptionError(
            f"{name} is not a valid safetensors file ({error}). Restore it from a copy, or write the cache again."
        ) from error
    return arrays, dict(header.get("__metadata__", {}))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without reading its arrays.

    Raises CorruptionError when the file is missing or damaged.
    """
    try:
        storage.refuse_huge(path)
        with safetensors.safe_open(path, "np") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptionError(f"{path} cannot be read: {error}. Restore it from a copy.") from error
