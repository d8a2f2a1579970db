"""A call into an engine that fails or never comes back ends as EngineError, or with the process and exit code 75.

What it protects: no hang. The calls that hang here really do: on an event that nobody sets, and on a lock in native
code, which no signal reaches.
"""

import subprocess
import sys
import threading
import time

import psutil
import pytest

from distill.errors import EngineError, RetryError, UsageError
from distill.teacher.guard import Guard

NATIVE_HANG = """
import ctypes, subprocess, sys
from distill.teacher import guard

guard._GRACE_S = 0.2
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)
libc.pthread_mutex_lock(lock)
with guard.Guard("native", failures=RuntimeError, advice="", limit_s=0.2):
    libc.pthread_mutex_lock(lock)
"""


def guard(limit_s: float = 0.2) -> Guard:
    return Guard("brittle", failures=RuntimeError, advice="Lower it.", limit_s=limit_s)


def test_a_call_that_waits_for_ever_is_given_up() -> None:
    with pytest.raises(EngineError, match=r"brittle engine hangs: no sign of life for 0\.2 s") as caught, guard():
        threading.Event().wait()
    assert caught.value.exit_code == 75


def test_signs_of_life_keep_a_call() -> None:
    watched = guard(0.5)
    with watched:
        for _ in range(10):
            threading.Event().wait(0.1)
            watched.beat()
    watched.close()


def test_nothing_is_watched_between_calls() -> None:
    watched = guard(0.1)
    with watched:
        pass
    watched.beat()
    threading.Event().wait(0.4)
    watched.close()


def test_what_a_call_fails_with() -> None:
    with pytest.raises(EngineError, match=r"engine stopped: out of memory\. .* Lower it\.") as caught, guard():
        raise RuntimeError("out of memory")
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(KeyError), guard():
        raise KeyError("a bug keeps its traceback")
    with pytest.raises(UsageError), guard():
        raise UsageError("the user's")


def test_a_call_in_native_code_ends_the_process_and_its_children() -> None:
    done = subprocess.run([sys.executable, "-c", NATIVE_HANG], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75
    assert "Error: The native engine hangs" in done.stderr
    assert "Traceback" not in done.stderr
    child = int(done.stdout)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE  # nobody's to reap


def test_a_process_that_was_suspended_goes_on() -> None:
    program = (
        "import sys\n"
        "from distill.teacher.guard import Guard\n"
        "with Guard('slow', failures=RuntimeError, advice='', limit_s=2):\n"
        "    print('waits', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waits\n"
        psutil.Process(waiting.pid).suspend()
        threading.Event().wait(3)
        psutil.Process(waiting.pid).resume()
        threading.Event().wait(0.5)  # long enough to look at the clock
        waiting.communicate("\n", timeout=60)
    assert waiting.returncode == 0


def test_a_call_in_another_thread_ends_the_process() -> None:
    program = (
        "import threading\n"
        "from distill.teacher.guard import Guard\n"
        "def work():\n"
        "    with Guard('lone', failures=RuntimeError, advice='', limit_s=0.2):\n"
        "        threading.Event().wait()\n"
        "threading.Thread(target=work).start()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "The lone engine hangs" in done.stderr) == (75, True)


def test_a_sign_of_life_as_a_call_ends_is_not_one_of_the_time_after(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, now = guard(1.0), time.monotonic

    def end_the_call() -> float:
        if threading.current_thread() is threading.main_thread():
            monkeypatch.undo()
            watched.__exit__(None, None, None)
        return now()

    watched.__enter__()
    monkeypatch.setattr("distill.teacher.guard.time.monotonic", end_the_call)
    watched.beat()
    threading.Event().wait(1.5)  # a slow store, say, which is no call
    watched.close()


def test_an_error_that_says_what_to_do_stays_as_it_is() -> None:
    with pytest.raises(RetryError, match=r"^the store is away$") as caught, guard():
        raise RetryError("the store is away")
    assert not isinstance(caught.value, EngineError)


def test_a_message_that_nobody_reads_does_not_keep_the_process() -> None:
    program = (
        "import sys, threading\n"
        "from distill.teacher.guard import Guard\n"
        "def work():\n"
        "    with Guard('lone', failures=RuntimeError, advice='', limit_s=0.2):\n"
        "        threading.Event().wait()\n"
        "sys.stderr.close()\n"
        "threading.Thread(target=work).start()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=20, check=False)
    assert done.returncode == 75
