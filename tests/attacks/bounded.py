"""Commands flow in, how each ended and how much memory it took flow out: ``python bounded.py LIMIT < commands.json``.

Each command runs in a fork of a process that has imported everything, which may not grow by more than LIMIT bytes.
Prints one JSON object for each: exit code, message, bytes by which the fork grew at its largest.
"""

import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import duckdb  # noqa: F401
import pandas  # noqa: F401
import pyarrow as pa
from typer.testing import CliRunner

from distill.__main__ import app
from distill.cache.reader import CacheReader
from distill.data.formats import jsonl_rows
from distill.errors import DistillError

pa.set_cpu_count(1)
pa.set_io_thread_count(1)


def outcome(command: Sequence[str], limit: int) -> dict[str, object]:
    """Run one command, or ``rows PATH`` for a data file, and measure."""
    before = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (before + limit, before + limit))
    resident = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    message, code = "", 0
    try:
        if command[0] == "rows":
            message = "; ".join(str(row.problem) for row in jsonl_rows(Path(command[1])) if row.problem)
        elif command[0] == "read":
            reader = CacheReader.open(command[1])
            for commit in reader.commits:
                reader.sequences(commit, "train")
        else:
            done = CliRunner().invoke(app, command)
            code, message = done.exit_code, done.output
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                raise done.exception
    except DistillError as error:
        code, message = error.exit_code, str(error)
    except BaseException as error:
        code, message = -1, repr(error)
    return {"code": code, "message": message[:600], "grown": _status("VmHWM") - resident}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def main() -> None:
    """One fork after the other."""
    limit = int(sys.argv[1])
    for command in json.load(sys.stdin):
        child = os.fork()
        if child == 0:
            os.write(1, (json.dumps(outcome(command, limit)) + "\n").encode())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            os.write(1, (json.dumps({"code": -status, "message": "killed", "grown": 0}) + "\n").encode())


if __name__ == "__main__":
    main()
