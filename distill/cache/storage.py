"""Bytes and names flow in, files that survive a power cut flow out; a name never leads out of the cache's folder.

A cache's root is a local folder or a ``Bucket``. ``root_of`` tells which; ``inside``, ``create``, ``put``, ``delete``,
``read_back``, ``names`` and ``folder`` work on either, and everything else on local files.

Nothing is ever visible half: content goes to a temporary file, is synced, and only then gets its name. ``create_once``
gives the name with ``os.link``, which fails when the name exists, so that of many writers exactly one wins.
"""

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from distill.cache.bucket import Bucket
from distill.errors import CorruptionError, StorageError, UsageError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
# pathlib folds the two slashes of a URL into one
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?P<rest>.*)")
Root = Path | Bucket
# Tells whether a disk gives back what it was sent. Against chance alone, and forty times as fast as SHA-256, which is
# taken of what comes back.
FINGERPRINT = xxhash.xxh3_128
_LARGEST_READ = 2**32  # bytes; a projection of 4096 coordinates over 256,000 ids takes half of it
TEMPORARY = ".partial"  # suffix of a file that is being written


def root_of(path: str | Path) -> Root:
    """The root of a cache: a folder, or a bucket for ``s3://bucket/prefix``. Raises UsageError for other URLs."""
    url = _URL.match(str(path))
    if url is None:
        return Path(path)
    if url["scheme"].lower() != "s3":
        raise UsageError(
            f"{path} is a URL of a kind that caches do not lie at. Name a local path or s3://bucket/prefix, or mount "
            "the store and name the mounted folder."
        )
    if not re.match(r"[A-Za-z0-9]", url["rest"]):
        raise UsageError(f"{path} names no bucket. Write s3://bucket/prefix.")
    return Bucket(url["rest"])


def local_root(path: str | Path) -> Path:
    """A local folder. Raises UsageError for a URL."""
    root = root_of(path)
    if isinstance(root, Bucket):
        raise UsageError(f"{path} is a URL, and a local folder is needed here. Name a local path.")
    return root


def inside(root: Root, name: str) -> Path:
    """The path of ``name`` below ``root``; of a bucket, of a local copy, if there is such an object.

    Raises CorruptionError when the name could lead elsewhere: absolute, with "..", a URL, or through a symbolic link;
    and for what is neither a file nor a folder, since reading a pipe never ends.
    """
    if not _NAME.fullmatch(name):
        raise CorruptionError(
            f"{root} names the file {name!r}, which may lie outside its folder. A cache never does: do not use it, and "
            "ask for a clean copy."
        )
    if isinstance(root, Bucket):
        return root.fetch(name)
    path = root
    for part in name.split("/"):
        path = path / part
        refuse_strange(path)
    return path


def refuse_strange(path: Path) -> None:
    """Raise CorruptionError for a symbolic link, a pipe, a socket or a device; a missing file is fine."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # missing, or below a file: who reads it will say so
        return
    if stat.S_ISLNK(mode):
        raise CorruptionError(
            f"{path} is a symbolic link. What belongs to a cache or a checkpoint lies in its own folder: replace the "
            "link by the file."
        )
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CorruptionError(f"{path} is neither a file nor a folder. Delete it, and restore the file from a copy.")


def create(root: Root, name: str, data: bytes) -> bool:
    """Create the file ``name``. False, and nothing changed, when somebody else has."""
    return root.create_once(name, data) if isinstance(root, Bucket) else create_once(inside(root, name), data)


def put(root: Root, name: str, fill: Callable[[BinaryIO], object], *, need: int) -> str:
    """As ``write``: a file whose name nobody else uses, or a replacement. Returns the fingerprint of what was sent."""
    if not isinstance(root, Bucket):
        return write(inside(root, name), fill, need=need)
    with tempfile.TemporaryDirectory(prefix="distill-") as scratch:
        path = Path(scratch) / "content"
        sent = write(path, fill, need=need)
        try:
            root.upload(name, path)
        except FileNotFoundError as error:
            raise StorageError(
                f"{root}/{name} cannot be written: {error}. Make the bucket, or change --out."
            ) from error
        return sent


@contextlib.contextmanager
def read_back(root: Root, name: str) -> Iterator[Path]:
    """A path to read what ``put`` left, from the store itself. Raises FileNotFoundError when it is gone."""
    if isinstance(root, Bucket):
        with root.read_back(name) as path:
            yield path
    else:
        yield inside(root, name)


def delete(root: Root, name: str) -> None:
    """Delete a file that may be gone already."""
    if isinstance(root, Bucket):
        root.remove(name)
    else:
        parent, _, file = name.rpartition("/")  # names of temporary files begin with a dot
        remove((inside(root, parent) if parent else root) / file)


def sizes(root: Root, folder: str) -> dict[str, int]:
    """Name -> bytes of all files below a folder of a cache, sorted. Raises CorruptionError as ``inside`` does."""
    if isinstance(root, Bucket):
        return root.sizes(folder)
    found = {}
    for path in sorted(inside(root, folder).rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # other writers tidy up
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                found[path.relative_to(root).as_posix()] = status.st_size
    return found


def names(root: Root, folder: str) -> list[str]:
    """Names of all files below a folder of a cache, sorted. Raises CorruptionError as ``inside`` does."""
    return list(sizes(root, folder))


def folder(root: Root, name: str) -> Path:
    """A local folder with all files of a folder of a cache. Raises CorruptionError where one could lead elsewhere."""
    if isinstance(root, Bucket):
        for found in root.sizes(name):
            inside(root, found)
        return root.local_folder(name)
    below = inside(root, name)
    for path in below.rglob("*"):
        refuse_strange(path)
    return below


def read(path: Path) -> bytes:
    """Content of a file. Raises FileNotFoundError where there is none, StorageError where it cannot be read.

    Raises CorruptionError as ``refuse_huge`` does.
    """
    try:
        refuse_huge(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}. Check the path and its rights.") from error


def refuse_huge(path: Path) -> None:
    """Raise CorruptionError for a file larger than any of a cache that is read whole, FileNotFoundError without one.

    A sparse file of a terabyte costs nobody a disk, and its reader an hour or all memory.
    """
    if path.stat().st_size > _LARGEST_READ:
        raise CorruptionError(f"{path} is far larger than such a file ever is. Restore it from a copy.")


def create_once(path: Path, data: bytes) -> bool:
    """Write ``data`` under a name that does not exist yet. False, and nothing changed, when it does.

    Raises StorageError when the disk refuses.
    """
    with _storage_errors(path, need=len(data)):
        _make_folder(path.parent)
        temporary = _temporary(path)
        try:
            _write_synced(temporary, lambda file: file.write(data))
            try:
                os.link(temporary, path)
            except FileExistsError:
                # Over NFS the answer to a link may be lost, and the client's second try meets the first one's work.
                if not _is_same_file(temporary, path):
                    return False
            sync(path.parent)
            return True
        finally:
            temporary.unlink(missing_ok=True)


def _is_same_file(path: Path, other: Path) -> bool:
    try:
        return os.path.samestat(path.lstat(), other.lstat())
    except FileNotFoundError:
        return False


def write(path: Path, fill: Callable[[BinaryIO], object], *, need: int) -> str:
    """Write a file whose name nobody else uses, or replace it: ``fill`` puts the content into an open file.

    ``need`` is the expected size in bytes, for the message. Returns the fingerprint of the bytes that were sent to
    the disk. Raises StorageError when the disk refuses.
    """
    with _storage_errors(path, need=need):
        _make_folder(path.parent)
        temporary = _temporary(path)
        try:
            sent = _write_synced(temporary, fill)
            temporary.replace(path)
            sync(path.parent)
            return sent
        finally:
            temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a file that may be gone already."""
    with _storage_errors(path, need=0):
        path.unlink(missing_ok=True)


def require_writable(root: Root) -> None:
    """Raise StorageError early where nothing could be written later: a read-only mount, a folder of someone else.

    A bucket tells only when it is written to.
    """
    if isinstance(root, Path) and not os.access(root, os.W_OK):
        raise StorageError(
            f"{root} cannot be written: it is read-only for you. Give yourself the right to write there, mount it "
            "for writing, or change --out."
        )


def _make_folder(folder: Path) -> None:
    """A folder whose name survives a power cut: what is synced into it would be lost with it."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # one may make folders where one may not list them
        sync(folder.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY}")


class _FingerprintedFile(io.FileIO):
    """Knows the fingerprint of what is written to it, front to back."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb")
        self.digest = FINGERPRINT()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += super().write(view[written:])
        self.digest.update(view)
        return written


def _write_synced(path: Path, fill: Callable[[BinaryIO], object]) -> str:
    with _FingerprintedFile(path) as file:
        fill(cast(BinaryIO, file))
        os.fsync(file.fileno())
        return file.digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(path: Path, *, need: int) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(_explain(path, error, need=need)) from error


def _explain(path: Path, error: OSError, *, need: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full: {path} needs {_size(need)}, {_free(path)} are free. Free some space and run the same "
            "command again; what is committed stays."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} cannot be written: {error.strerror}. Give yourself the right to write there, or change --out."
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{path} cannot be written: a file stands where a folder should be. Move it away, or change --out."
    reason = error.strerror or str(error)
    return (
        f"{path} cannot be written: {reason}. Check the disk, then run the same command again; what is committed stays."
    )


def _free(path: Path) -> str:
    for folder in path.parents:
        if folder.is_dir():
            return _size(shutil.disk_usage(folder).free)
    return "an unknown number of bytes"


def _size(num_bytes: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes = num_bytes // 1000
    return f"{num_bytes} GB"
