"""Requests for an object store flow in; they flow on to it, or what goes wrong between two machines happens to them.

busy       the store is not asked, the answer is 503
reset      the connection is reset, the store not asked
silent     no answer comes
truncated  the store is asked, its answer breaks off in the middle
forgetful  the store is asked and does what it is asked, the answer is 503
"""

import contextlib
import http.client
import http.server
import random
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

FAULTS = ("busy", "reset", "silent", "truncated", "forgetful")
_HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive", "expect", "content-length")


@dataclass(slots=True, kw_only=True)
class Plan:
    """Which requests fail, and how: those of ``method`` with ``part`` in their path, ``times`` of them."""

    fault: str
    times: int
    method: str = ""
    part: str = ""
    chance: float = 1.0


@dataclass(slots=True)
class Proxy:
    """A store at ``upstream``, seen through ``url``; ``failed`` lists what went wrong: fault, method, path."""

    upstream: str
    url: str = ""
    plans: list[Plan] = field(default_factory=list)
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def fault_of(self, method: str, path: str) -> str | None:
        """What happens to a request."""
        with self.lock:
            for plan in self.plans:
                fits = plan.times > 0 and plan.method in ("", method) and plan.part in path
                if fits and self.rng.random() < plan.chance:
                    plan.times -= 1
                    self.failed.append((plan.fault, method, path))
                    return plan.fault
        return None


@contextlib.contextmanager
def proxy_of(upstream: str) -> Iterator[Proxy]:
    """A proxy on a free port of this machine, until the context ends."""
    proxy = Proxy(upstream)

    class Handler(_Handler):
        facing = proxy

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield proxy
        finally:
            proxy.closing.set()
            server.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    facing: Proxy

    def do_GET(self) -> None:
        fault = self.facing.fault_of(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.close_connection = fault is not None
        if fault == "busy":
            self._busy()
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "silent":
            self.facing.closing.wait(20)
        else:
            self._forward(body, fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _busy(self) -> None:
        content = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        self.send_response(503)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _forward(self, body: bytes, fault: str | None) -> None:
        place = urlsplit(self.facing.upstream)
        upstream = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # the host as it was signed
                if name.lower() not in _HOP_BY_HOP:
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        if fault == "forgetful":
            self._busy()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "truncated" else content)

    def log_message(self, *_arguments: object) -> None:
        pass
