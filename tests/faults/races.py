"""A plan of many units flows in, filled by several writers that all want all of it; how often each unit was won."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.cache.writer import CacheWriter
from distill.records import Reject
from distill.report.verify import verify
from tests.faults.filler import Job, account_of_cache
from tests.faults.torture import in_child


def race(root: Path | str, *, writers: int, units: int) -> dict[str, Any]:
    """``writers`` forks begin at the same moment and commit the same ``units`` units in the same order.

    ``contested`` units are those whose record some writer found already there.
    """
    job = Job.make(num_rows=4 * units)
    read_end, write_end = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(number) for number in range(writers)]

        def work(result: Path) -> None:
            os.close(write_end)
            os.read(read_end, 1)  # returns when the last one that could write has closed the pipe
            result.write_text(json.dumps(_commit_all(root, job)))

        children = [in_child(lambda result=result: work(result)) for result in results]
        os.close(write_end)
        failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
        os.close(read_end)
        nonces = [json.loads(result.read_text()) for result in results if result.exists()]
        figures = Path(folder) / "figures"
        os.waitpid(in_child(lambda: figures.write_text(json.dumps(_look(root, job)))), 0)
        looked = json.loads(figures.read_text())
    return {
        "writers": writers,
        "units": units,
        "failed": failed,
        "winners": [len({each[unit]["nonce"] for each in nonces}) for unit in range(units)].count(1),
        "contested": sum(len({each[unit]["own"] for each in nonces}) == 2 for unit in range(units)),
        **looked,
    }


def _commit_all(root: Path | str, job: Job) -> list[dict[str, Any]]:
    writer = CacheWriter.open(root, job.plan)
    assert job.teacher.projection is not None
    writer.put_once("projection.safetensors", job.teacher.projection.to_bytes())
    found = []
    for unit in job.plan.units:
        items = list(job.read_unit(unit))
        rejects = [item for item in items if isinstance(item, Reject)]
        numbers = [number for number in range(unit.start, unit.stop) if number % 7 != 5]
        missing = unit in writer.missing_units()
        commit = writer.commit(
            unit,
            [job.row(unit, number) for number in numbers],
            rejects=rejects,
            num_input_rows=unit.num_input_rows,
        )
        found.append({"nonce": commit.nonce, "own": missing})
    assert writer.seal() is not None
    return found


def _look(root: Path | str, job: Job) -> dict[str, Any]:
    account = asdict(account_of_cache(root, job))
    return {**account, "problems": len(verify(root).problems)}
