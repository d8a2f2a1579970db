"""A manifest's file flows in, the manifest flows out, whatever its size.

A cache of a hundred thousand units has a manifest of 80 MB. As one JSON tree that would take ten times as much memory
for a moment, so its commit records are read in pieces, which the prescribed indentation tells apart.
"""

from collections.abc import Iterator

from distill.cache import document, storage
from distill.cache.plan import Commit, Manifest

_OPEN, _CLOSE = b'\n  "commits": [\n', b"\n  ]"
_RECORD_END = b"\n    },"
_PIECE = 2**20  # bytes


def load_manifest(root: storage.Root, name: str, *, fix: str) -> Manifest:
    """The manifest ``name`` of a cache.

    Raises FileNotFoundError where there is none, CorruptionError that says ``fix`` where it is damaged.
    """
    data, path = storage.read(storage.inside(root, name)), f"{root}/{name}"
    length = document.checked(data, path=path, fix=fix)
    start = data.find(_OPEN, 0, length)
    stop = data.find(_CLOSE, start, length)
    if start < 0 or stop < 0:  # no commit, or not indented by our rules
        return document.validated(Manifest, data[:length] + b"\n}", path=path, fix=fix)
    frame = data[:start] + b'\n  "commits": [' + data[stop:length] + b"\n}"
    manifest = document.validated(Manifest, frame, path=path, fix=fix)
    commits: list[Commit] = []
    for piece in _pieces(data, start + len(_OPEN), stop):
        commits += document.validated(list[Commit], piece, path=path, fix=fix)
    return manifest.model_copy(update={"commits": tuple(commits)})


def _pieces(data: bytes, start: int, stop: int) -> Iterator[bytes]:
    """The records in ``data[start:stop]`` as JSON arrays of about a megabyte."""
    while start < stop:
        end = data.find(_RECORD_END, start + _PIECE, stop)
        end = stop if end < 0 else end + len(_RECORD_END)
        yield b"[" + data[start:end].removesuffix(b",") + b"]"
        start = end
