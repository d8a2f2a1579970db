"""Processes for the tests of the commit protocol: ``python workers.py race|crash FOLDER``.

``race``: eight processes commit the same units; each prints the nonces of the records that it got. ``crash``: for every
step of a commit a process kills itself there; a rerun follows; what it found is printed. Forked once everything is
imported, before anything has started a thread.
"""

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.cache.reader import CacheReader

_spec = importlib.util.spec_from_file_location("fixtures", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
fixtures: Any = importlib.util.module_from_spec(_spec)
sys.modules["fixtures"] = fixtures
_spec.loader.exec_module(fixtures)


def in_child(work: Callable[[], None]) -> int:
    """Process id of a fork that does ``work``."""
    child = os.fork()
    if child == 0:
        work()
        sys.stdout.flush()
        os._exit(0)
    return child


def race(folder: Path) -> None:
    """All processes begin at the same moment: when the pipe closes."""
    teacher = fixtures.make_teacher()
    plan = fixtures.plan_of(teacher, rows={"general": 12}, unit_rows=2)
    read_end, write_end = os.pipe()

    def work() -> None:
        os.close(write_end)
        os.read(read_end, 1)
        writer = fixtures.CacheWriter.open(folder / "cache", plan)
        writer.put_once("projection.safetensors", teacher.projection.to_bytes())
        commits = [
            writer.commit(unit, fixtures.rows_of(teacher, unit), rejects=[], num_input_rows=unit.num_input_rows)
            for unit in plan.units
        ]
        writer.seal()
        os.write(1, (json.dumps([commit.nonce for commit in commits]) + "\n").encode())

    children = [in_child(work) for _ in range(8)]
    os.close(write_end)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)


def die_at(step: int) -> None:
    """Kill this process at the step-th moment before or after a call that changes the disk."""
    moment = 0

    def passing() -> None:
        nonlocal moment
        if moment == step:
            os.kill(os.getpid(), signal.SIGKILL)
        moment += 1

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **options: Any) -> Any:
            passing()
            result = call(*arguments, **options)
            passing()
            return result

        return inner

    for name in ("fsync", "link", "replace", "unlink"):
        setattr(os, name, wrapped(getattr(os, name)))


def crash(folder: Path) -> None:
    """One process for each moment, until one lives through."""
    teacher = fixtures.make_teacher()
    plan = fixtures.plan_of(teacher, rows={"general": 4})
    unit = plan.units[0]
    for step in range(1000):
        root = folder / str(step)
        fixtures.fill(root, teacher, plan, num_units=0)

        def work(root: Path = root, step: int = step) -> None:
            writer = fixtures.CacheWriter.open(root, plan)
            rows = fixtures.rows_of(teacher, unit)
            die_at(step)
            writer.commit(unit, rows, rejects=[], num_input_rows=4)

        _, status = os.waitpid(in_child(work), 0)
        if status == 0:
            return
        visible = not fixtures.CacheWriter.open(root, plan).missing_units()
        writer = fixtures.fill(root, teacher, plan)
        assert writer.missing_units() == []
        result = {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "visible": visible,
            "rows_after_rerun": CacheReader.open(root).num_rows(),
            "files_after_rerun": len(os.listdir(root / "shards")),
        }
        os.write(1, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    {"race": race, "crash": crash}[sys.argv[1]](Path(sys.argv[2]))
