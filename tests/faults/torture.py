"""A way of filling a cache flows in, killed again and again until it is done; figures of what survived flow out.

All writers are forks of this process, which must have started no thread; what reads a cache back runs in a fork, too.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.errors import DistillError
from distill.launch.worker import Worker
from distill.report.verify import verify
from tests.faults.filler import Job, account_of_cache, account_of_naive, fill_cache, fill_naively

Place = Any  # a folder, or the URL of one in a bucket
Fill = Callable[[Place, Job, Worker], None]
Account = dict[str, int]
_LONGEST_LIFE_S = 0.1  # between two kills; a fill of two writers takes a few times that
_KILLS_PER_CACHE = 8
_STUCK_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tortured:
    """Sums over all caches that were filled under kills."""

    caches: int
    kills: int
    writers: int  # processes that were started: two for each cache, and one after each kill
    failed: int  # writers that ended by an error of their own
    rows: int
    lost: int
    doubled: int
    silent: int
    torn: int
    problems: int  # that ``verify`` found

    @property
    def survived(self) -> bool:
        """All rows are there once, as they should be."""
        return not (self.failed or self.lost or self.doubled or self.silent or self.torn or self.problems)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "survived": self.survived}


def torture_cache(
    folder: Path, *, kills: int, seed: int, bucket: str | None = None, longest_life_s: float = _LONGEST_LIFE_S
) -> Tortured:
    """Fill caches with the program's own writers until ``kills`` of them have been killed.

    The caches lie in ``folder``, or below the URL ``bucket``.
    """
    return _torture(
        folder, fill_cache, _look_at_cache, kills=kills, seed=seed, bucket=bucket, longest_life_s=longest_life_s
    )


def torture_naive(folder: Path, *, kills: int, seed: int) -> Tortured:
    """The same with the naive writer."""
    return _torture(folder, fill_naively, _look_at_naive, kills=kills, seed=seed)


def in_child(work: Callable[[], object]) -> int:
    """Process id of a fork that does ``work``; it exits with a DistillError's code, with 1 after any other error."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except DistillError as error:
        code = error.exit_code
        print(f"exit {code}: {error}", file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _torture(
    folder: Path,
    fill: Fill,
    look: Callable[[Place, Job, Path], None],
    *,
    kills: int,
    seed: int,
    bucket: str | None = None,
    longest_life_s: float = _LONGEST_LIFE_S,
) -> Tortured:
    rng = random.Random(seed)
    job = Job.make(num_rows=96)
    totals = dict.fromkeys(("caches", "kills", "writers", "failed"), 0)
    account: Account = dict.fromkeys(("rows", "lost", "doubled", "silent", "torn", "problems"), 0)
    folder.mkdir()
    while totals["kills"] < kills:
        result = folder / f"{totals['caches']}.json"
        root: Any = f"{bucket}/{totals['caches']}" if bucket else folder / f"{totals['caches']}"
        # In every second cache both writers want all units in the same order, so that each unit is raced for.
        shared = totals["caches"] % 2 == 1
        workers = [Worker()] * 2 if shared else [Worker(index=index, count=2) for index in range(2)]
        ended = _kill_until_done(
            lambda worker, root=root: fill(root, job, worker),
            workers,
            kills=min(_KILLS_PER_CACHE, kills - totals["kills"]),
            longest_life_s=longest_life_s,
            rng=rng,
        )
        for name, number in ended.items():
            totals[name] += number
        totals["caches"] += 1
        _, status = os.waitpid(in_child(lambda root=root, result=result: look(root, job, result)), 0)
        if status:
            totals["failed"] += 1
            continue
        for name, number in json.loads(result.read_text()).items():
            account[name] += number
    return Tortured(**totals, **account)


def _kill_until_done(
    work: Callable[[Worker], None], workers: list[Worker], *, kills: int, longest_life_s: float, rng: random.Random
) -> dict[str, int]:
    """Both writers at once; one of them, or both, dies at a random moment and is started again."""

    def start(worker: Worker) -> int:
        return in_child(lambda: work(worker))

    alive = {start(worker): worker for worker in workers}
    figures = {"kills": 0, "writers": len(alive), "failed": 0}
    while alive:
        stuck = figures["kills"] >= kills  # when the kills are over and nobody ends for so long
        ended = first_to_end(set(alive), within=_STUCK_S if stuck else rng.uniform(0, longest_life_s))
        if ended is not None:
            child, status = ended
            del alive[child]
            figures["failed"] += status != 0
            continue
        both = stuck or rng.random() < 0.25
        for child in list(alive) if both else [rng.choice(list(alive))]:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            worker = alive.pop(child)
            if stuck or not os.WIFSIGNALED(status):  # the latter: it was faster
                figures["failed"] += status != 0
                continue
            figures["kills"] += 1
            figures["writers"] += 1
            alive[start(worker)] = worker
    return figures


def first_to_end(children: set[int], *, within: float) -> tuple[int, int] | None:
    """(process, status) of a child that ended within so many seconds, or None."""
    until = time.monotonic() + within
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        while True:
            for child in children:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    return child, status
            left = until - time.monotonic()
            if left <= 0:
                return None
            signal.sigtimedwait({signal.SIGCHLD}, left)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _look_at_cache(root: Place, job: Job, result: Path) -> None:
    problems = verify(root).problems
    for item in problems:
        print(f"{root}: {item.file}: {item.text}", file=sys.stderr)
    result.write_text(json.dumps({**asdict(account_of_cache(root, job)), "problems": len(problems)}))


def _look_at_naive(root: Place, job: Job, result: Path) -> None:
    result.write_text(json.dumps(asdict(account_of_naive(root, job))))
