"""Local bytes flow into objects of an S3 bucket, each created once; objects flow back as files on this machine.

Objects of a cache never change under their name, so one that was fetched need not be fetched again. What is fetched
lies in a temporary folder that goes with the process; shards beyond ``KEPT_BYTES`` make room, the oldest first.

A store that is busy, slow or gone for a while is asked again, with growing random pauses, ``TRIES`` times at most. So
a request may have been carried out although its answer was lost: when a store says that an object exists, it is read
back, since it may be our own.
"""

import contextlib
import errno
import random
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from distill.errors import RetryError, StorageError, UsageError

Result = TypeVar("Result")
TRIES = 7
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
KEPT_BYTES = 8 * 2**30  # of shards in the temporary folder
_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}}
_ONE_REQUEST = 5 * 2**30  # bytes; a conditional put of several parts is not honoured by every store
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Bucket:
    """A cache's folder in an S3 bucket: ``s3://bucket/prefix``. Picklable; a copy fetches anew.

    Credentials and endpoint are found in the usual places: environment, profile, instance, fsspec's configuration.
    Methods raise StorageError when the store refuses for good, RetryError when it is unreachable, UsageError when s3fs
    is not installed.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.rstrip("/")
        self._lock = threading.RLock()
        self._opened: Any = None
        self._folder: Path | None = None
        self._shards: dict[str, int] = {}  # fetched ones -> bytes, the latest used last

    def __str__(self) -> str:
        return f"s3://{self._prefix}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Bucket, (self._prefix,)

    def __truediv__(self, name: str) -> Path:
        """As of a local folder: the path of a file, which exists if the object does."""
        return self.fetch(name)

    def fetch(self, name: str) -> Path:
        """The path of a file with the object's content; no file is there when there is no such object."""
        with self._lock:
            path = self._local_folder() / name
            if not path.exists():
                self._download(name, path)
            if name.startswith("shards/") and path.exists():
                self._shards.pop(name, None)
                self._shards[name] = path.stat().st_size
                self._make_room()
            return path

    def create_once(self, name: str, data: bytes) -> bool:
        """Create an object unless there is one; True as well when the one that is there has this very content."""

        def create(store: Any, key: str) -> bool:
            try:
                store.pipe_file(key, data, mode="create", chunksize=_ONE_REQUEST)
            except OSError as error:
                if not isinstance(error, FileExistsError) and error.errno != errno.EINVAL:
                    raise
                return self._holds(store, key, data, error)
            return True

        return self._write(name, create)

    def upload(self, name: str, path: Path) -> None:
        """Put a file's content under a name that nobody else uses, or replace it; in parts where it is large."""
        self._write(name, lambda store, key: store.put_file(str(path), key))

    @contextlib.contextmanager
    def read_back(self, name: str) -> Iterator[Path]:
        """A file with what the store holds now; it goes afterwards. Raises FileNotFoundError without an object."""
        with tempfile.TemporaryDirectory(prefix="distill-") as scratch:
            path = Path(scratch) / "content"
            self._download(name, path)
            if not path.exists():
                raise FileNotFoundError(errno.ENOENT, "it is not there", f"{self}/{name}")
            yield path

    def remove(self, name: str) -> None:
        """Delete an object that may be gone already."""
        self._call(name, lambda store, key: store.rm_file(key))

    def sizes(self, folder: str) -> dict[str, int]:
        """Name -> bytes of the objects below a folder, sorted by name."""
        listed = self._call(folder, lambda store, key: store.find(key, detail=True))
        below = f"{self._prefix}/{folder}/"  # some stores keep an object for the folder itself
        found = {
            key.removeprefix(f"{self._prefix}/"): int(about["size"] or 0)
            for key, about in listed.items()
            if key.startswith(below) and not key.endswith("/")
        }
        return dict(sorted(found.items()))

    def modified(self, folder: str) -> dict[str, tuple[int, float]]:
        """Name -> bytes and time of modification, by the store's clock, of the objects below a folder."""
        listed = self._call(folder, lambda store, key: store.find(key, detail=True))
        below = f"{self._prefix}/{folder}/"
        return {
            key.removeprefix(f"{self._prefix}/"): (int(about["size"] or 0), about["LastModified"].timestamp())
            for key, about in listed.items()
            if key.startswith(below) and not key.endswith("/")
        }

    def uploads(self) -> list[tuple[str, str, float]]:
        """Name, id and time of beginning of the uploads in parts that were neither ended nor given up."""
        bucket, _, prefix = self._prefix.partition("/")
        found: list[tuple[str, str, float]] = []
        page: dict[str, Any] = {"IsTruncated": True}
        while page.get("IsTruncated"):
            marks = {name: page[f"Next{name}"] for name in ("KeyMarker", "UploadIdMarker") if page.get(f"Next{name}")}
            page = self._call("", partial(_list_uploads, bucket=bucket, marks=marks))
            for upload in page.get("Uploads", []):
                key: str = upload["Key"].lstrip("/")
                if key.startswith(f"{prefix}/"):
                    name = key.removeprefix(f"{prefix}/")
                    found.append((name, upload["UploadId"], upload["Initiated"].timestamp()))
        return found

    def abort_upload(self, name: str, upload_id: str) -> None:
        """Give up an upload in parts, whose parts the store then forgets."""
        bucket, _, prefix = self._prefix.partition("/")
        arguments = {"Bucket": bucket, "Key": f"{prefix}/{name}", "UploadId": upload_id}
        with contextlib.suppress(FileNotFoundError):
            self._call(name, lambda store, _: store.call_s3("abort_multipart_upload", **arguments))

    def local_folder(self, folder: str) -> Path:
        """A local folder with those objects of a folder that were fetched."""
        return self._local_folder() / folder

    @staticmethod
    def _holds(store: Any, key: str, data: bytes, conflict: OSError) -> bool:
        """Whether an object that is said to exist is our own."""
        try:
            return bool(store.cat_file(key) == data)
        except FileNotFoundError:
            raise OSError(errno.EIO, str(conflict)) from conflict  # s3fs says EINVAL of broken requests too

    def _write(self, name: str, action: Callable[[Any, str], Result]) -> Result:
        try:
            return self._call(name, action)
        except FileNotFoundError as error:
            raise StorageError(
                f"{self}/{name} cannot be written: {error}. Make the bucket, or change --out."
            ) from error

    def _local_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="distill-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def _download(self, name: str, path: Path) -> None:
        partial = path.with_name(f"{path.name}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._call(name, lambda store, key: store.get_file(key, str(partial)))
            partial.replace(path)
        except FileNotFoundError:
            return
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self) -> None:
        while len(self._shards) > 1 and sum(self._shards.values()) > KEPT_BYTES:
            oldest = next(iter(self._shards))
            del self._shards[oldest]
            (self._local_folder() / oldest).unlink(missing_ok=True)

    def _call(self, name: str, action: Callable[[Any, str], Result]) -> Result:
        """Raises FileNotFoundError as it comes."""
        store = self._store()
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError

        reason: Exception | None = None
        for number in range(TRIES):
            if number:
                time.sleep(random.uniform(0.5, 1) * min(FIRST_PAUSE_S * 2 ** (number - 1), LONGEST_PAUSE_S))
            try:
                return action(store, f"{self._prefix}/{name}")
            except FileNotFoundError:
                raise
            except (OSError, BotoCoreError, ClientError) as error:
                _refuse(f"{self}/{name}", error)
                reason = error
        raise RetryError(
            f"the store does not answer for {self}/{name}: {reason} ({TRIES} tries). What is committed stays: run the "
            "same command again when the store is up; AWS_ENDPOINT_URL_S3 names another than Amazon's."
        ) from reason

    def _store(self) -> Any:
        with self._lock:
            if self._opened is None:
                self._opened = _open()
            return self._opened


def _list_uploads(store: Any, _key: str, *, bucket: str, marks: dict[str, str]) -> dict[str, Any]:
    page: dict[str, Any] = store.call_s3("list_multipart_uploads", Bucket=bucket, **marks)
    return page


def _open() -> Any:
    import fsspec

    try:
        store = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True, config_kwargs=_TIMEOUTS)
    except ImportError as error:
        raise UsageError(
            "s3:// needs s3fs, which is not installed. Run pip install 'distill[s3]', or name a local folder."
        ) from error
    store.retries = 1  # tries are counted here, not again inside each of them
    return store


def _refuse(where: str, error: Exception) -> None:
    """Raise StorageError for what no second try would change."""
    from botocore import exceptions

    hopeless = (
        PermissionError,
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.ProfileNotFound,
        exceptions.ParamValidationError,
    )
    if isinstance(error, hopeless):
        raise StorageError(
            f"the store refuses access to {where}: {str(error).rstrip('.')}. Check the key and its secret "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), that it may list, read, write and delete "
            "there, and that AWS_ENDPOINT_URL_S3 names the right store."
        ) from error
    if isinstance(error, OSError) and error.errno in _FULL:
        raise StorageError(
            f"the local disk is full: {where} cannot be fetched to {tempfile.gettempdir()}. Free some space, or set "
            "TMPDIR to a folder on a larger disk."
        ) from error
