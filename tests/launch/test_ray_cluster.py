"""Places of a job on a real Ray cluster of this machine.

What it protects: an actor that dies is started again and no more often than promised, one that is given up leaves the
rest to the others, errors keep their exit codes, and no engine is asked for that the cluster has no room for.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill.errors import DataError, DistillError, RetryError, UsageError
from distill.launch.ray_cluster import MOST_RESTARTS, Cluster, joined, place_engines, run_places

Work = Callable[[dict[str, Any], int, int], None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'distill[test]'")
    before, os.environ["RAY_ADDRESS"] = os.environ.get("RAY_ADDRESS"), "local"
    try:
        with joined(gpus=0, num_workers=2) as found:
            yield found
    finally:
        del os.environ["RAY_ADDRESS"]
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def starts_of(folder: Path, cluster: Cluster, work: Work) -> list[int]:
    """How often each place was begun."""
    log = folder / "starts"

    def logged(config: dict[str, Any], index: int, count: int) -> None:
        with log.open("a") as file:
            file.write(str(index))
        work(config, index, count)

    try:
        run_places(logged, {"folder": str(folder)}, cluster, look=lambda: None)
    finally:
        starts = [log.read_text().count(str(index)) for index in range(cluster.num_places)]
    return starts


def test_each_place_is_held_once_where_the_command_was_started(cluster: Cluster, tmp_path: Path) -> None:
    here = str(Path.cwd())

    def work(config: dict[str, Any], index: int, count: int) -> None:
        assert (os.getcwd(), count) == (here, 2)
        Path(config["folder"], f"place-{index}").touch()

    assert starts_of(tmp_path, cluster, work) == [1, 1]
    assert sorted(path.name for path in tmp_path.glob("place-*")) == ["place-0", "place-1"]


def test_an_actor_that_dies_is_started_again(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(config: dict[str, Any], index: int, _count: int) -> None:
        mark = Path(config["folder"], "died")
        if index == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9)

    assert starts_of(tmp_path, cluster, work) == [1, 2]
    assert "worker 1/2 stopped: its process died" in capsys.readouterr().err


def test_a_place_is_given_up_and_the_other_goes_on(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_config: dict[str, Any], index: int, _count: int) -> None:
        if index == 0:
            raise RetryError("the engine died.")

    assert starts_of(tmp_path, cluster, work) == [1 + MOST_RESTARTS, 1]
    assert f"the engine died. It is given up after {MOST_RESTARTS} restarts" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(DataError("row 7."), 3), (RetryError("no engine."), 75)])
def test_errors_keep_their_exit_codes(cluster: Cluster, tmp_path: Path, error: DistillError, code: int) -> None:
    def work(_config: dict[str, Any], _index: int, _count: int) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)) as caught:
        starts_of(tmp_path, cluster, work)
    assert caught.value.exit_code == code


_STOPPED = """
import pathlib, signal, sys, time
from distill.interrupt import Interrupt
from distill.launch.ray_cluster import joined, run_places

def main():
    def work(config, index, count):
        pathlib.Path(config["folder"], str(index)).touch()
        signal.pause()
    def look():
        if len(list(pathlib.Path(sys.argv[1]).iterdir())) == 2:
            signal.raise_signal(signal.SIGTERM)
    with joined(gpus=0, num_workers=2) as cluster:
        run_places(work, {"folder": sys.argv[1]}, cluster, look=look)

with Interrupt(at_once=True) as interrupt:
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"stopped by {interrupt.name}")
"""


def test_a_signal_stops_the_driver_and_its_actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'distill[test]'")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    command = [sys.executable, "-c", _STOPPED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "stopped by SIGTERM" in done.stderr
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert left == []


GPU_NODE, CPU_NODE = {"GPU": 8.0, "CPU": 64.0}, {"CPU": 16.0}


@pytest.mark.parametrize(
    ("nodes", "gpus", "wanted", "found"),
    [
        ([GPU_NODE, GPU_NODE], 8, None, Cluster(num_places=2, gpus=8)),
        ([GPU_NODE, GPU_NODE, CPU_NODE], 3, None, Cluster(num_places=4, gpus=3)),
        ([GPU_NODE], 2, 3, Cluster(num_places=3, gpus=2)),
        ([CPU_NODE, CPU_NODE], 1, None, Cluster(num_places=2, gpus=0)),
        ([GPU_NODE], 0, 5, Cluster(num_places=5, gpus=0)),
    ],
)
def test_engines_get_the_room_that_there_is(
    nodes: list[dict[str, float]], gpus: int, wanted: int | None, found: Cluster
) -> None:
    assert place_engines(nodes, gpus=gpus, num_workers=wanted) == found


@pytest.mark.parametrize(
    ("nodes", "gpus", "wanted", "says"),
    [
        ([GPU_NODE, GPU_NODE], 16, None, "room for 0 engines that need 16 GPU"),
        ([GPU_NODE], 4, 3, "room for 2 engines that need 4 GPU each, all on one node; 3 are asked for"),
        ([CPU_NODE], 1, 17, "room for 16 engines that need 1 CPU"),
    ],
)
def test_more_than_there_is_room_for_is_refused(
    nodes: list[dict[str, float]], gpus: int, wanted: int | None, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        place_engines(nodes, gpus=gpus, num_workers=wanted)
