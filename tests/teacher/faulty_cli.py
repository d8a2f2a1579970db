"""The command line with one fault: python faulty_cli.py FAULT COUNT cache-teacher … — run in a process of its own.

``SIGTERM`` or ``SIGUSR1`` comes when COUNT units are committed; with ``full`` the disk then takes no more than 1 kB
for each file.
"""

import os
import resource
import signal
import sys
from typing import Any

from distill.__main__ import main
from distill.cache.writer import CacheWriter


def break_after(fault: str, count: int) -> None:
    """Let the fault happen once ``count`` units are committed."""
    commit, done = CacheWriter.commit, 0

    def faulty(self: CacheWriter, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if done == count and fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        record = commit(self, *args, **kwargs)
        done += 1
        if done == count and fault != "full":
            os.kill(os.getpid(), getattr(signal, fault))
        return record

    CacheWriter.commit = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    fault_name, after = sys.argv[1:3]
    sys.argv[1:3] = []
    break_after(fault_name, int(after))
    main()
