"""``cache-teacher --ray``: a configuration flows in, a cache that the engines of a Ray cluster filled flows out.

The driver checks everything and writes the plan, as a worker does before its teacher loads, and seals at the end. In
between each actor is an ordinary worker of the job (``distill.teacher.job``).
"""

import time
from typing import Any

from distill.config import CacheConfig
from distill.errors import RetryError
from distill.interrupt import Interrupt
from distill.launch import ray_cluster
from distill.launch.gpus import gpus_of_engine
from distill.launch.worker import Worker
from distill.progress import Ticker
from distill.teacher.job import CacheResult, Job, cache_teacher, prepare, stopped_message

_COUNT_EVERY_S = 30.0  # between two counts of what the workers did


def cache_teacher_on_ray(config: CacheConfig, *, num_workers: int | None = None, quiet: bool = False) -> CacheResult:
    """Fill the cache at ``config.out`` with ``num_workers`` engines, or as many as the cluster has room for.

    Raises as ``cache_teacher`` does, and RetryError when units are missing after every worker has ended or was given
    up.
    """
    job: Job | None = None
    with Interrupt(at_once=True) as interrupt:
        try:
            job = prepare(config)
            return _run(job, num_workers, quiet=quiet)
        except KeyboardInterrupt as error:
            raise RetryError(stopped_message(interrupt.name or "SIGINT", job)) from error


def _run(job: Job, num_workers: int | None, *, quiet: bool) -> CacheResult:
    missing = {unit.unit for unit in job.writer.missing_units()}
    started = time.monotonic()
    if missing:
        ticker = Ticker("cache-teacher", total=len(missing), quiet=quiet)
        with ray_cluster.joined(gpus=gpus_of_engine(job.config), num_workers=num_workers) as cluster, ticker:
            look = _Progress(job, ticker, num_missing=len(missing))
            ray_cluster.run_places(_work, job.config.model_dump(mode="json"), cluster, look=look)
    seconds = time.monotonic() - started
    manifest = job.writer.seal()
    if manifest is None:
        raise RetryError(
            f"{job.writer.root}: {len(job.writer.missing_units())} of {len(job.writer.plan.units)} units are still "
            "missing, and no worker is left. Run the same command again."
        )
    written = [commit for commit in manifest.commits if commit.unit in missing]
    return CacheResult(
        root=job.writer.root,
        manifest=manifest,
        num_units_written=len(written),
        num_targets=sum(commit.num_targets.total for commit in written),
        seconds=seconds if missing else 0.0,
    )


def _work(config: dict[str, Any], index: int, count: int) -> None:
    """What an actor does."""
    cache_teacher(CacheConfig.model_validate(config), worker=Worker(index=index, count=count), quiet=True)


class _Progress:
    """Shows, when it is called, how many of the missing units are in."""

    def __init__(self, job: Job, ticker: Ticker, *, num_missing: int) -> None:
        self._job, self._ticker, self._num_missing = job, ticker, num_missing
        self._num_done, self._counted = 0, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._counted > _COUNT_EVERY_S:
            self._num_done = self._num_missing - len(self._job.writer.missing_units())
            self._counted = time.monotonic()
        self._ticker.update(self._num_done)
