"""A Ray cluster and a job that is split into places flow in, what each place came to flows out.

Every place is held by one plain actor, which has one engine and as many GPUs as that spans. Actors share nothing but
the cache: they pull units from it and commit to it, so one that dies costs the units that it had open. It is started
again ``MOST_RESTARTS`` times at most; the others take over what a place that is given up has left.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import DistillError, RetryError, UsageError

MOST_RESTARTS = 3  # of the actor of one place
_LOOK_EVERY_S = 2.0
Work = Callable[[dict[str, Any], int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What may be asked of the cluster that this process is connected to: ``num_places`` engines at a time."""

    num_places: int
    gpus: int  # of each


class _Holder:
    """The actor. It works where the driver was started, so that relative paths are the same."""

    def run(self, work: Work, config: dict[str, Any], place: tuple[int, int, str]) -> DistillError | None:
        """What stopped the work, if anything did that a user can mend. ``place`` is index, count and folder."""
        index, count, folder = place
        if not Path(folder).is_dir():
            return UsageError(
                f"{folder}, where the command was started, is not to be seen from {os.uname().nodename}. Start it in a "
                "folder that all nodes share."
            )
        os.chdir(folder)
        try:
            work(config, index, count)
        except DistillError as error:
            return error
        return None


@contextlib.contextmanager
def joined(*, gpus: int, num_workers: int | None) -> Iterator[Cluster]:
    """Join the cluster that ``RAY_ADDRESS`` or this machine names, or begin one on this machine; leave it at the end.

    Raises UsageError when ray is not installed, or when the cluster has no room for ``num_workers`` engines of
    ``gpus`` GPUs each (of one CPU each where the cluster has no GPU).
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # a cluster that begins here reports nothing to anybody
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs ray, which is not installed. Run pip install 'distill[ray]'.") from error
    with contextlib.redirect_stdout(sys.stderr):  # Ray remarks on a death there, and stdout is the command's result
        with _own_signals():
            ray.init(log_to_driver=False, logging_level="error", include_dashboard=False)
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            yield place_engines(nodes, gpus=gpus, num_workers=num_workers)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Put the handlers of signals back: Ray's own end the process at once, and without an exit code of ours."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            signal.signal(number, handler)


def place_engines(nodes: Sequence[Mapping[str, float]], *, gpus: int, num_workers: int | None) -> Cluster:
    """Room on ``nodes`` (their resources) for ``num_workers`` engines, each on one node. Raises UsageError without it.

    None: as many as there is room for; one for each node where there are only CPUs.
    """
    gpus = gpus if any(node.get("GPU") for node in nodes) else 0
    kind, each = ("GPU", gpus) if gpus else ("CPU", 1)
    room = sum(int(node.get(kind, 0)) // each for node in nodes)
    wanted = num_workers or (room if gpus else min(room, len(nodes)))
    if not 1 <= wanted <= room:
        raise UsageError(
            f"the Ray cluster has room for {room} engines that need {each} {kind} each, all on one node; "
            f"{max(wanted, 1)} are asked for. Change --ray-workers, or tensor_parallel_size and pipeline_parallel_size "
            "in engine_options, or add nodes."
        )
    return Cluster(num_places=wanted, gpus=gpus)


def run_places(work: Work, config: dict[str, Any], cluster: Cluster, *, look: Callable[[], None]) -> None:
    """Run ``work(config, index, count)`` in an actor for each place, until all have ended or are given up.

    ``look`` is called every few seconds. Raises what an actor raised unless a second try may mend it, and RetryError
    when every place was given up.
    """
    import ray

    actor = ray.remote(num_cpus=1, num_gpus=cluster.gpus, scheduling_strategy="SPREAD")(_Holder)
    count, folder = cluster.num_places, str(Path.cwd())
    running: dict[Any, tuple[int, Any]] = {}

    def start(index: int) -> None:
        held = actor.remote()
        running[held.run.remote(work, config, (index, count, folder))] = (index, held)

    restarts = dict.fromkeys(range(count), 0)
    for index in range(count):
        start(index)
    reason: DistillError | None = None
    num_ended = 0
    while running:
        done, _ = ray.wait(list(running), timeout=_LOOK_EVERY_S)
        look()
        for reference in done:
            index, held = running.pop(reference)
            error = _outcome(reference)
            ray.kill(held)
            if error is None:
                num_ended += 1
            elif not isinstance(error, RetryError):
                raise error
            else:
                reason = error
                again = restarts[index] < MOST_RESTARTS
                print(_told(index, count, error, again=again), file=sys.stderr)
                if again:
                    restarts[index] += 1
                    start(index)
    if not num_ended and reason is not None:
        raise RetryError(f"every worker on the Ray cluster was given up, the last one because: {reason}") from reason


def _outcome(reference: Any) -> DistillError | None:
    import ray

    try:
        error: DistillError | None = ray.get(reference)
    except ray.exceptions.RayActorError as death:
        return RetryError(f"its process died ({str(death).splitlines()[0]})")
    return error


def _told(index: int, count: int, error: DistillError, *, again: bool) -> str:
    consequence = "It is started again" if again else f"It is given up after {MOST_RESTARTS} restarts"
    return f"Note: worker {index}/{count} stopped: {error} {consequence}; what it committed stays."
