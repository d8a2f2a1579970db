"""Protects against a power cut: nothing becomes visible before it is on the disk, and a failed sync commits nothing.

A real writer runs under strace, which shows the order of its system calls and makes some of them fail.
"""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from distill.cache.writer import CacheWriter
from distill.launch.worker import Worker
from distill.report.verify import verify
from tests.faults.filler import Job, account_of_cache, fill_cache

ROOT = Path(__file__).parents[2]
NUM_ROWS = 8  # two units
CALLS = "fsync,fdatasync,rename,renameat,renameat2,link,linkat"
# strace counts for each thread. That which writes units syncs the cache's folder (where shards/ is new), the shard,
# shards/, the cache's folder (where commits/ is new), the record, commits/.
FAULTS = [
    *(f"fsync:error=EIO:when={number}" for number in range(1, 7)),
    "rename:error=EIO:when=1",
    "link:error=EIO:when=1",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A system call that changes the disk. ``path`` is what became visible or was synced, below the cache's folder."""

    thread: str
    name: str
    path: str
    source: str  # of a rename or link
    failed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A writer that ran under strace."""

    root: Path
    exit_code: int
    message: str
    calls: list[Call]


def strace(root: Path, *options: str) -> Run:
    log = root.with_name(f"{root.name}.log")
    tracing = ["strace", "-f", "--seccomp-bpf", "-y", "-qq", "-o", str(log), "-e", f"trace={CALLS}", *options]
    command = [sys.executable, "-m", "tests.faults.writer", str(root), str(NUM_ROWS)]
    done = subprocess.run([*tracing, *command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return Run(root=root, exit_code=done.returncode, message=done.stderr, calls=parsed(log, root))


def parsed(log: Path, root: Path) -> list[Call]:
    calls = []
    pattern = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
    for line in joined(log.read_text().splitlines()):
        found = pattern.match(line)
        if found is None or str(root) not in line:
            continue
        thread, name, arguments, result = found.groups()
        paths = re.findall(rf"{re.escape(str(root))}(?:/[^\">]*)?", arguments)
        below = [path.removeprefix(str(root)).lstrip("/") or "." for path in paths]
        calls.append(Call(thread=thread, name=name, path=below[-1], source=below[0], failed=result != "0"))
    return calls


def joined(lines: list[str]) -> list[str]:
    """The two halves of a call that another thread's interrupted, put together where it ended."""
    open_calls: dict[str, str] = {}
    whole = []
    for line in lines:
        thread = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            open_calls[thread] = line.removesuffix("<unfinished ...>").rstrip()
        elif "resumed>" in line:
            whole.append(open_calls.pop(thread, thread) + line.partition("resumed>")[2])
        else:
            whole.append(line)
    return whole


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One run without a fault, and one for each fault, in caches that have been begun."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    allowed = subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True, text=True, check=False)
    if allowed.returncode:
        pytest.skip(f"strace may not trace here (it needs ptrace): {allowed.stderr.strip()}")
    folder, job = tmp_path_factory.mktemp("power"), Job.make(num_rows=NUM_ROWS)
    begun = folder / "begun"
    assert job.teacher.projection is not None
    CacheWriter.open(begun, job.plan).put_once("projection.safetensors", job.teacher.projection.to_bytes())

    def run(item: tuple[int, str]) -> Run:
        number, fault = item
        root = folder / f"cache-{number}"
        if not fault:
            return strace(root)
        shutil.copytree(begun, root)
        return strace(root, "-e", f"inject={fault}")

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(["", *FAULTS], pool.map(run, enumerate(["", *FAULTS])), strict=True))


def made_visible(calls: list[Call]) -> list[tuple[int, Call]]:
    return [(number, call) for number, call in enumerate(calls) if call.name.startswith(("rename", "link"))]


def test_nothing_is_visible_before_it_is_on_the_disk(runs: dict[str, Run]) -> None:
    assert runs[""].exit_code == 0, runs[""].message
    everything = runs[""].calls
    names = [call.path.split("/")[0] for _, call in made_visible(everything)]
    assert sorted(names) == sorted(
        ["plan.json", "projection.safetensors", *["shards", "commits"] * 2, "README.md", "manifest.json"]
    )
    for thread in {call.thread for call in everything}:
        calls = [call for call in everything if call.thread == thread]
        visible = made_visible(calls)
        for (number, call), (following, _) in zip(visible, [*visible[1:], (len(calls), None)], strict=True):
            assert calls[number - 1].source == call.source, f"{call.path} is synced, then named"
            folders = [item.path for item in calls[number:following] if item.name == "fsync"]
            assert str(Path(call.path).parent) in folders, f"{call.path} is named, then its folder synced"


def test_a_shard_is_on_the_disk_before_its_record_is_visible(runs: dict[str, Run]) -> None:
    calls = runs[""].calls
    named = {call.path: number for number, call in made_visible(calls)}
    records = [path for path in named if path.startswith("commits/")]
    assert len(records) == 2
    for record in records:
        unit = Path(record).stem
        shard = next(path for path in named if path.startswith(f"shards/{unit}-"))
        between = [call.path for call in calls[named[shard] : named[record]]]
        assert "shards" in between
        assert named[record] < named["manifest.json"]


def test_a_new_folder_is_on_the_disk_before_what_is_in_it(runs: dict[str, Run]) -> None:
    calls = runs[""].calls
    for folder in ("shards", "commits"):
        first = next(number for number, call in enumerate(calls) if call.path.startswith(f"{folder}/"))
        before = [call.path for call in calls[:first] if call.thread == calls[first].thread]
        assert before[-1] == "."


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_failed_call_nothing_is_committed(runs: dict[str, Run], fault: str) -> None:
    run = runs[fault]
    assert run.exit_code == 6, run.message
    assert run.message.startswith("Error: ")
    assert "Traceback" not in run.message
    assert run.message.count("\n") == 1
    assert "run the same command again" in run.message
    assert any(call.failed for call in run.calls), "the fault struck"
    for number, call in enumerate(run.calls):
        later = [item for _, item in made_visible(run.calls[number + 1 :]) if item.thread == call.thread]
        # Another unit may have been on its way already. It begins with its shard; a record would be the failed unit's.
        if call.failed and later:
            assert later[0].path.startswith("shards/"), f"{call.path} failed, then {later[0].path} became visible"
    assert not (run.root / "manifest.json").exists()
    assert not list(run.root.rglob("*.partial"))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_command_finishes_afterwards(runs: dict[str, Run], fault: str, tmp_path: Path) -> None:
    root, job = Path(shutil.copytree(runs[fault].root, tmp_path / "cache")), Job.make(num_rows=NUM_ROWS)
    fill_cache(root, job, Worker())
    account = asdict(account_of_cache(root, job))
    assert (account["rows"], account["lost"], account["doubled"], account["silent"]) == (NUM_ROWS, 0, 0, 0)
    assert verify(root).ok
