"""Calls into a teacher's engine flow in; what they fail with, and that one never comes back, flows out as EngineError.

A device that hangs, and a process that waits for another for ever, raise nothing. So a thread looks at the clock while
a call is on its way. When its time is up, a signal interrupts the main thread and EngineError is raised there: whoever
waited for another process waits no longer, and the engine can be closed and loaded again. A call deep in native code
sees no signal; then nothing ends it but the end of the process.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Self

import psutil

from distill.errors import DistillError, EngineError

_SIGNAL = signal.SIGVTALRM  # schedulers, engines and test runners use others
_GRACE_S = 20.0  # that a call may take to notice the signal


class _Call:
    """A call that is on its way; ``seen`` is when it last gave a sign of life."""

    def __init__(self) -> None:
        self.seen = time.monotonic()


class Guard:
    """Watches the calls into one engine, one at a time: a context manager around each of them.

    A call that fails with ``failures`` raises EngineError that ends in ``advice``; so does one that takes ``limit_s``
    seconds without a ``beat``. One that no signal reaches, because it is in native code or not in the main thread, ends
    the process with the same exit code (75) and its children with it: what is committed stays.
    """

    def __init__(self, engine: str, *, failures: type[Exception], advice: str, limit_s: float) -> None:
        self._engine, self._failures, self._advice, self._limit_s = engine, failures, advice, limit_s
        self._call: _Call | None = None
        self._caller: int | None = None  # its thread, if that can be interrupted
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="guard", daemon=True).start()

    def beat(self) -> None:
        """Notes that the call that is on its way, if there is one, is alive."""
        call = self._call  # which may end meanwhile: then what is noted of it concerns nobody
        if call is not None:
            call.seen = time.monotonic()

    def close(self) -> None:
        """Ends the thread; nothing is watched any more."""
        self._closed.set()

    def __enter__(self) -> Self:
        self._caller = None
        if threading.current_thread() is threading.main_thread():
            # Never taken back: the signal may arrive just after the call, and would then end the process.
            signal.signal(_SIGNAL, self._interrupt)
            self._caller = threading.get_ident()
        self._call = _Call()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call = None
        if isinstance(error, self._failures) and not isinstance(error, DistillError):
            reason = str(error).rstrip(".") or type(error).__name__
            raise EngineError(
                f"The {self._engine} engine stopped: {reason}. Committed units are kept; run the same command again to "
                f"go on. {self._advice}"
            ) from error

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_late(self._call):
            self._call = None
            raise self._hang()

    def _is_late(self, call: _Call | None) -> bool:
        return call is not None and time.monotonic() - call.seen >= self._limit_s

    def _hang(self) -> EngineError:
        return EngineError(
            f"The {self._engine} engine hangs: no sign of life for {self._limit_s:g} s. Committed units are kept; run "
            "the same command again to go on, with a higher stall_seconds if the engine is only slow."
        )

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(self._limit_s / 20):
            if time.monotonic() - looked > self._limit_s / 2:
                self.beat()  # the whole process stood still: a scheduler suspended it
            looked, call = time.monotonic(), self._call
            if not self._is_late(call):
                continue
            if self._caller is not None:
                signal.pthread_kill(self._caller, _SIGNAL)
                if self._closed.wait(_GRACE_S):
                    return
            if self._call is call and self._is_late(call):
                self._end_process()
            looked = time.monotonic()

    def _end_process(self) -> None:
        try:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            print(f"Error: {self._hang()}", file=sys.stderr, flush=True)
        finally:  # also where nobody reads the message any more
            os._exit(EngineError.exit_code)
