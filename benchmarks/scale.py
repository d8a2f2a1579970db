"""What a cache of many units costs besides the teacher: ``python -m benchmarks.scale --json out.json``.

64 forked workers fill a cache of 100,000 units by the program's own protocol, with rows that no teacher made, two to a
unit; the same is done with a tenth of the units, so that anything that grows faster than their number shows. Then the
cache is sealed, opened, looked at and made ready for training, each in a process of its own, whose seconds and extra
memory are taken. On a real object store (SeaweedFS, on this machine) the requests of each worker are counted.

Where the disk is slow or shared, ``--fill-units 2000`` has the workers fill that many and puts copies of their records
in place of the others: what comes after the filling reads records alone.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.reader import made_up_plan
from distill.cache import document
from distill.cache.plan import Commit, Plan, Source, plan_units
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter
from distill.config import TrainConfig
from distill.launch.worker import Worker
from distill.records import Prompt, SequenceTargets, Targets
from distill.report.status import status
from distill.student.order import DomainOrder
from distill.student.stage import plan_stage, settings_of
from distill.student.stream import TrainStream
from distill.teacher.fill import units_to_do

UNIT_ROWS, LENGTH, TOP_K = 2, 9, 8
TEMPERATURES = (4.0, 2.0, 1.0)
_FORK = multiprocessing.get_context("fork")


def plan_of(num_units: int) -> Plan:
    """Units of two rows of one source; no hidden states."""
    num_rows = num_units * UNIT_ROWS
    source = Source(domain="general", path="general.jsonl", sha256="0" * 64, num_rows=num_rows, split="train")
    like = made_up_plan(UNIT_ROWS)
    identity = like.identity.model_copy(update={"top_k": TOP_K, "temperatures": TEMPERATURES, "hidden_bytes": 0})
    units = tuple(plan_units([source], UNIT_ROWS))
    return like.model_copy(update={"identity": identity, "sources": (source,), "units": units})


def targets() -> Targets:
    """The same for every row: half of the mass in falling log-probabilities, half outside."""
    num = LENGTH - 1
    falling = -np.arange(TOP_K, dtype=np.float64)
    logprobs = falling - np.log(np.exp(falling).sum()) + np.log(0.5)
    log_z = [np.log(2 * np.exp(logprobs / T).sum()) for T in TEMPERATURES]
    return Targets(
        topk_ids=np.tile(np.arange(TOP_K, dtype=np.int32), (num, 1)),
        topk_logprobs=np.tile(logprobs.astype(np.float32), (num, 1)),
        log_z=np.tile(np.array(log_z, np.float32), (num, 1)),
        log_tail=np.full((num, len(TEMPERATURES)), np.log(0.5), np.float32),
        hidden={},
        entropy=np.ones(num, np.float32),
    )


def row(number: int, kept: Targets) -> SequenceTargets:
    """The sequence of an input row."""
    prompt = Prompt(
        sequence_id=f"{number:064x}",
        prompt_id=f"{number:064x}",
        domain="general",
        split="train",
        source=f"general.jsonl:{number}",
        prompt="question",
        response="answer",
        input_ids=np.arange(LENGTH, dtype=np.int32),
        loss_mask=np.arange(LENGTH - 1) > 2,
    )
    return SequenceTargets(prompt=prompt, targets=kept)


def fill(root: str | Path, plan: Plan, worker: Worker, *, most: int | None = None) -> int:
    """Commit what is missing, as a worker does, or ``most`` units of it; returns how many were committed."""
    writer, kept, num = CacheWriter.open(root, plan), targets(), 0
    for unit in units_to_do(writer, worker):
        rows = [row(number, kept) for number in range(unit.start, unit.stop)]
        writer.commit(unit, rows, rejects=[], num_input_rows=len(rows))
        num += 1
        if num == most:
            break
    return num


def fill_with(
    root: str | Path, plan: Plan, num_workers: int, *, most: int | None = None, counted: bool = False
) -> tuple[float, Counter[str]]:
    """Fill a cache, or ``most`` units of it by each worker, from many processes.

    Returns seconds, and the requests to the store of all of them where ``counted``.
    """
    requests: Any = _FORK.Queue()

    def work(index: int) -> None:
        place = Worker(index=index, count=num_workers)
        with counted_requests() if counted else contextlib.nullcontext(Counter[str]()) as mine:
            fill(root, plan, place, most=most)
        requests.put(mine)

    started = time.perf_counter()
    workers = [_FORK.Process(target=work, args=(index,)) for index in range(num_workers)]
    for worker in workers:
        worker.start()
    total = sum((requests.get() for _ in workers), Counter[str]())
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return time.perf_counter() - started, total


def forge(root: Path, plan: Plan) -> None:
    """Copies of a record for all units that have none, and empty files in place of their shards."""
    missing = CacheWriter.open(root, plan).missing_units()
    name = next((root / "commits").iterdir()).name
    like = document.load(Commit, root, f"commits/{name}", fix="")
    for unit in missing:
        shard = f"shards/{unit.unit}-{like.nonce}.parquet"
        (root / shard).touch()
        (root / "commits" / f"{unit.unit}.json").write_bytes(
            document.render(replace(like, unit=unit.unit, shard=shard))
        )


@contextlib.contextmanager
def counted_requests() -> Iterator[Counter[str]]:
    """Requests that s3fs sends meanwhile, by kind."""
    from s3fs import S3FileSystem

    found, send = Counter[str](), S3FileSystem._call_s3

    async def counting(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        found[method] += 1
        return await send(self, method, *args, **kwargs)

    S3FileSystem._call_s3 = counting
    try:
        yield found
    finally:
        S3FileSystem._call_s3 = send


def apart(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, of the processor and in all, and megabytes of memory that ``work`` takes in a process of its own."""
    answers: Any = _FORK.Queue()

    def measure() -> None:
        before, started = _memory("VmRSS"), time.perf_counter()
        cpu = time.process_time()
        kept = work()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        after, peak = _memory("VmRSS"), _memory("VmHWM")
        del kept
        answers.put({"seconds": seconds, "cpu_seconds": cpu_seconds, "mb": after - before, "peak_mb": peak - before})

    process = _FORK.Process(target=measure)
    process.start()
    answer: dict[str, float] = answers.get()
    process.join()
    return answer


def _memory(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def start_training(root: Path) -> Any:
    """All that a stage does with the cache's records before it loads a model, and the first batch's place."""
    reader = CacheReader.open(root)
    stages = {1: {"tail": "bucket"}}
    config = TrainConfig.model_validate({"cache": str(root), "student": "none", "out": "none", "stages": stages})
    plan = plan_stage(config, 1, reader)
    settings_of(config, plan, reader, "student")
    stream = TrainStream(reader, plan.orders, plan.assigned, max_length=512)
    return reader, plan, stream, plan.orders[0].window(0)


def walk_epoch(root: Path) -> None:
    """Find the rows of every window of an epoch."""
    reader = CacheReader.open(root)
    stages = {1: {"tail": "bucket"}}
    config = TrainConfig.model_validate({"cache": str(root), "student": "none", "out": "none", "stages": stages})
    order: DomainOrder = plan_stage(config, 1, reader).orders[0]
    position = 0
    while position < order.num_rows:
        position = order.window(position).stop


def measure_local(folder: Path, num_units: int, num_workers: int, *, num_filled: int) -> dict[str, Any]:
    """Everything about a cache on a disk, ``num_filled`` of whose units are filled by workers."""
    root = folder / f"cache-{num_units}"
    found: dict[str, Any] = {"plan": apart(lambda: CacheWriter.open(root, plan_of(num_units)))}
    plan = plan_of(num_units)
    most = None if num_filled >= num_units else max(num_filled // num_workers, 1)
    seconds, _ = fill_with(root, plan, num_workers, most=most)
    num_done = len(list((root / "commits").iterdir()))
    found["fill"] = {"units": num_done, "seconds": seconds, "units_per_s": num_done / seconds}
    forge(root, plan)
    found["join"] = apart(lambda: CacheWriter.open(root, plan).missing_units())
    found["status_unsealed"] = apart(lambda: status(root))
    found["seal"] = apart(lambda: CacheWriter.open(root, plan).seal())
    found["manifest_mb"] = (root / "manifest.json").stat().st_size / 1e6
    found["open"] = apart(lambda: CacheReader.open(root))
    found["status"] = apart(lambda: status(root))
    found["start_training"] = apart(lambda: start_training(root))
    found["walk_epoch"] = apart(lambda: walk_epoch(root))
    shutil.rmtree(root)
    return found


def measure_store(folder: Path, num_units: int, num_workers: int) -> dict[str, Any]:
    """Requests for each unit, and seconds, on an object store."""
    from tests.storage.conftest import KEY, SECRET, Server

    server = Server(folder)
    os.environ |= {
        "AWS_ENDPOINT_URL_S3": server.url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    url, plan, found = "s3://bucket/scale", plan_of(num_units), {}
    server.start()
    try:
        seconds, requests = fill_with(url, plan, num_workers, counted=True)
        found["fill"] = {
            "seconds": seconds,
            "units_per_s": num_units / seconds,
            "requests_per_unit": {name: num / num_units for name, num in sorted(requests.items())},
        }
        works = {
            "join": lambda: CacheWriter.open(url, plan).missing_units(),
            "seal": lambda: CacheWriter.open(url, plan).seal(),
            "open": lambda: CacheReader.open(url),
        }
        found |= {name: apart_with_requests(work) for name, work in works.items()}
    finally:
        server.kill()
    return found


def apart_with_requests(work: Callable[[], Any]) -> dict[str, Any]:
    """As ``apart``, with the number of requests."""
    counts: Any = _FORK.Queue()

    def counted() -> Any:
        with counted_requests() as requests:
            kept = work()
        counts.put(sum(requests.values()))
        return kept

    return {**apart(counted), "requests": counts.get()}


def system_calls(folder: Path, *, num: int = 20) -> dict[str, float] | None:
    """System calls of one worker for each unit, by strace; None where that is not installed."""
    if shutil.which("strace") is None:
        return None
    counts = []
    for units in (1, 1 + num):  # the difference leaves out what comes once
        log = folder / "strace"
        code = (
            "from benchmarks.scale import *; "
            f"fill({str(folder / f'strace-{units}')!r}, plan_of({1 + num}), Worker(), most={units})"
        )
        command = ["strace", "-f", "-c", "-S", "name", "-U", "name,calls", "-o", log, sys.executable, "-c", code]
        subprocess.run([str(word) for word in command], check=True)
        lines = [line.split() for line in log.read_text().splitlines()[2:]]
        counts.append(
            Counter(
                {
                    words[0]: int(words[1])
                    for words in lines
                    if len(words) == 2 and words[1].isdigit() and words[0] != "total"
                }
            )
        )
    growth = {name: (counts[1][name] - counts[0][name]) / num for name in counts[1]}
    return {name: value for name, value in sorted(growth.items()) if value >= 0.5}


def growth_of(small: dict[str, Any], large: dict[str, Any], factor: float) -> dict[str, float]:
    """Processor seconds of the larger cache over those of the smaller one, over the ratio of units: 1 is linear."""
    return {
        name: large[name]["cpu_seconds"] / max(small[name]["cpu_seconds"], 1e-3) / factor
        for name in large
        if isinstance(large[name], dict) and "cpu_seconds" in large[name]
    }


def measure(folder: Path, *, num_units: int, num_workers: int, num_filled: int, num_store_units: int) -> dict[str, Any]:
    """All figures."""
    tenth = max(num_units // 10, 1)
    small = measure_local(folder, tenth, num_workers, num_filled=num_filled // 10)
    large = measure_local(folder, num_units, num_workers, num_filled=num_filled)
    report: dict[str, Any] = {
        "units": num_units,
        "workers": num_workers,
        "local": large,
        "a_tenth": small,
        "growth": growth_of(small, large, num_units / tenth),
        "system_calls_per_unit": system_calls(folder),
    }
    if num_store_units:
        (folder / "store").mkdir()
        report["store"] = {"units": num_store_units} | measure_store(folder / "store", num_store_units, 8)
    return report


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--fill-units", type=int, help="units that the workers fill; by default all")
    parser.add_argument("--store-units", type=int, default=1_000, help="units on the object store; 0 leaves it out")
    parser.add_argument("--folder", type=Path, help="the disk to measure; by default that of temporary files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        report = measure(
            Path(name),
            num_units=arguments.units,
            num_workers=arguments.workers,
            num_filled=arguments.fill_units or arguments.units,
            num_store_units=arguments.store_units,
        )
    table = Table("measure", "value", title=f"{arguments.units:,} units, {arguments.workers} workers")
    for key, value in _flat(report):
        table.add_row(key, f"{value:,.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
