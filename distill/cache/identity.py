"""Tokens, texts and weight files flow in, hashes that two machines agree on flow out; two plans, their differences."""

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distill.cache.plan import Identity, Plan
from distill.errors import StorageError, UsageError

_READERS = 4  # hashing releases the interpreter's lock


def token_map_hash(token_map: Mapping[str, int]) -> str:
    """SHA-256 of the token -> id map in order of ids. Vocabulary sizes agree by accident; this does not."""
    pairs = sorted((number, token) for token, number in token_map.items())
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()


def text_hash(text: str) -> str:
    """SHA-256 of a text, a chat template for example."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_files_hash(folder: str | Path) -> str:
    """SHA-256 over names and contents of a model folder's ``*.safetensors`` files.

    Raises UsageError when there are none: pickled weights run code when they load, and are refused. Raises
    StorageError when a file cannot be read.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        found = f"only pickled weights ({pickled[0]})" if pickled else "no weights"
        raise UsageError(
            f"{folder} holds {found}. distill reads safetensors, which cannot run code when they load: save the model "
            "with save_pretrained(..., safe_serialization=True), or name another folder."
        )
    try:
        with ThreadPoolExecutor(_READERS) as pool:
            digests = list(pool.map(_weights_hash, paths))
    except OSError as error:
        raise StorageError(f"cannot read the weights in {folder}: {error}. Check the folder and its rights.") from error
    listing = "".join(f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


def _weights_hash(path: Path) -> str:
    if path.is_symlink():
        target = path.readlink()
        # A hub snapshot links to blobs that the hub's client named after the SHA-256 it verified.
        if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
            return target.name
    return file_hash(path)


def differences(cache: Identity, asked: Identity) -> list[str]:
    """One line for each field that differs: "top_k: cache 64, asked 32"."""
    return [
        f"{name}: cache {_shown(getattr(cache, name))}, asked {_shown(getattr(asked, name))}"
        for name in Identity.model_fields
        if getattr(cache, name) != getattr(asked, name)
    ]


def data_differences(cache: Plan, asked: Plan) -> list[str]:
    """One line for each way in which two plans' data differ. Contents count, paths do not: a moved file is the same."""
    lines = []
    if len(cache.sources) != len(asked.sources):
        lines.append(f"sources: cache {len(cache.sources)}, asked {len(asked.sources)}")
    for old, new in zip(cache.sources, asked.sources, strict=False):
        lines += [
            f"{name} of {new.path}: cache {_shown(getattr(old, name))}, asked {_shown(getattr(new, name))}"
            for name in ("domain", "num_rows", "split", "sha256", "columns")
            if getattr(old, name) != getattr(new, name)
        ]
    if cache.eval_fraction != asked.eval_fraction:
        lines.append(f"eval_fraction: cache {_shown(cache.eval_fraction)}, asked {_shown(asked.eval_fraction)}")
    if not lines and cache.units != asked.units:
        lines.append(f"units: cache {len(cache.units)}, asked {len(asked.units)}")
    return lines


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={text}" for name, text in value.items()) or "as found"
    if isinstance(value, tuple):
        return ", ".join(_shown(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", value):
        return f"{value[:12]}…"
    return "none" if value is None else str(value)
