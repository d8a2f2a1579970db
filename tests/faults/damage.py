"""A sealed cache flows in, is damaged in one place at a time and mended again; how much was noticed flows out."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.cache.plan import Commit
from distill.cache.reader import CacheReader
from distill.errors import CorruptionError, DistillError, StorageError
from distill.launch.worker import Worker
from distill.report.verify import verify
from distill.student.checkpoint import State, read_checkpoint, write_checkpoint
from tests.faults.filler import Job, account_of_cache, fill_cache
from tests.faults.torture import in_child

KINDS = {
    "shard": "shards/*.parquet",
    "commit": "commits/*.json",
    "manifest": "manifest.json",
    "plan": "plan.json",
    "projection": "projection.safetensors",
    "rejects": "rejects/*.jsonl",
}
_FULL = ("tmpfs", "4m", "16m")  # file system, its first size, its size after some space was made


def flip_bits(folder: Path, *, flips: int, seed: int) -> dict[str, dict[str, int]]:
    """For each kind of file, one random bit of a random one at a time: how many flips ``verify`` names."""
    root = folder / "flips"
    fill_cache(root, Job.make(num_rows=16), Worker())
    rng = random.Random(seed)
    figures = {}
    for kind, pattern in KINDS.items():
        paths = sorted(root.glob(pattern))
        caught = sum(_named_after(root, rng.choice(paths), lambda data: _flipped(data, rng)) for _ in range(flips))
        figures[kind] = {"flips": flips, "caught": caught}
    assert verify(root).ok, "every file has been mended"
    return {**figures, "checkpoint": _flip_checkpoint(folder / "step-1", flips=flips, rng=rng)}


def _flip_checkpoint(folder: Path, *, flips: int, rng: random.Random) -> dict[str, int]:
    """The same in the files of a checkpoint, its state among them: how many flips reading it names."""

    def fill(aside: Path) -> None:
        for name in ("model/model.safetensors", "model/config.json", "trainer.safetensors"):
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_bytes(rng.randbytes(4096))

    write_checkpoint(folder, State(stage=1, step=1, position=8, finished=False, settings={"seed": 42}), fill)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    caught = 0
    for _ in range(flips):
        path = rng.choice(paths)
        content = path.read_bytes()
        path.write_bytes(_flipped(content, rng))
        try:
            read_checkpoint(folder)
        except CorruptionError as error:
            caught += str(path) in str(error)
        path.write_bytes(content)
    read_checkpoint(folder)
    return {"flips": flips, "caught": caught}


def damage_shards(folder: Path, *, seed: int) -> dict[str, dict[str, int]]:
    """Every shard cut at a random place, and every one in another's place: how often reader and ``verify`` refuse."""
    root = folder / "shards"
    fill_cache(root, Job.make(num_rows=40), Worker())
    rng = random.Random(seed)
    commits = CacheReader.open(root).commits
    paths = {commit.unit: root / commit.shard for commit in commits}
    contents = {unit: path.read_bytes() for unit, path in paths.items()}
    figures = {name: {"shards": len(commits), "caught": 0} for name in ("truncated", "swapped")}
    for index, commit in enumerate(commits):
        own, other = contents[commit.unit], contents[commits[index - 1].unit]
        for name, wrong in (("truncated", own[: rng.randrange(len(own))]), ("swapped", other)):
            paths[commit.unit].write_bytes(wrong)
            named = any(item.unit == commit.unit for item in verify(root).problems)
            figures[name]["caught"] += named and _refused(root, commit)
            paths[commit.unit].write_bytes(own)
    assert verify(root).ok, "every shard has been mended"
    return figures


def fill_the_disk(folder: Path) -> dict[str, Any]:
    """Fill a cache on a file system that has no room for it, then again with more room.

    ``skipped`` says why where no file system can be mounted here.
    """
    kind, size, larger = _FULL
    mount = folder / "full"
    mount.mkdir()
    if os.geteuid() != 0:
        return {"skipped": "mounting a small file system needs root"}
    done = subprocess.run(
        ["mount", "-t", kind, "-o", f"size={size}", kind, str(mount)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"skipped": f"no small file system can be mounted here: {done.stderr.strip()}"}
    try:
        return _fill_twice(mount, larger)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def _fill_twice(mount: Path, larger: str) -> dict[str, Any]:
    root, job = mount / "cache", Job.make(num_rows=96)
    room = 2**17  # for about half of the cache
    (mount / "ballast").write_bytes(bytes(shutil.disk_usage(mount).free - room))
    began = time.monotonic()
    code = _exit_code(lambda: fill_cache(root, job, Worker()))
    seconds = time.monotonic() - began
    report = verify(root)
    subprocess.run(["mount", "-o", f"remount,size={larger}", str(mount)], check=True)
    rerun = _exit_code(lambda: fill_cache(root, job, Worker()))
    account = account_of_cache(root, job)
    return {
        "exit_code": code,
        "expected_exit_code": StorageError.exit_code,
        "seconds": round(seconds, 2),
        "units_before": report.num_committed,
        "units": report.num_units,
        "torn": len(report.problems),
        "rerun_exit_code": rerun,
        "problems_after": len(verify(root).problems),
        "lost": account.lost,
        "doubled": account.doubled,
        "silent": account.silent,
    }


def _exit_code(work: Callable[[], object]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])


def _named_after(root: Path, path: Path, change: Callable[[bytes], bytes]) -> bool:
    """Whether ``verify`` names the file, or its unit, while its content is changed."""
    data = path.read_bytes()
    path.write_bytes(change(data))
    try:
        name = path.relative_to(root).as_posix()
        unit = path.name.partition("-")[0].partition(".")[0]
        return any(item.file == name or item.unit == unit for item in verify(root).problems)
    except DistillError as error:
        return path.name in str(error)
    finally:
        path.write_bytes(data)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _refused(root: Path, commit: Commit) -> bool:
    try:
        CacheReader.open(root).read_unit(commit)
    except CorruptionError as error:
        return commit.unit in str(error)
    return False
