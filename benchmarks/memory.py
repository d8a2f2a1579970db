"""Whether the memory of ``distill cache-teacher`` stays flat: many short prompts, one tiny teacher in vLLM.

    python -m benchmarks.memory [--rows 200000] [--unit-rows 2000] [--json FILE]

Prints the process's resident memory at every tenth of the run. After the first tenth it may grow by 10%.
"""

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from tests.teacher.families import save_tiny

_EVERY_S = 0.5


class Watch:
    """Samples this process's resident memory, its children's included, and how many units are committed."""

    def __init__(self, commits: Path) -> None:
        self._commits = commits
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[tuple[int, int]] = []  # units, bytes

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(_EVERY_S):
            family = [process, *process.children(recursive=True)]
            num_units = len(list(self._commits.iterdir())) if self._commits.is_dir() else 0
            self.samples.append((num_units, sum(member.memory_info().rss for member in family)))


def write_prompts(path: Path, num_rows: int) -> None:
    """Lines of a few words that the tiny tokenizer knows."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            words = " ".join(f"t{(row * 7 + i * 13) % 400 + 10}" for i in range(2 + row % 7))
            file.write(json.dumps({"text": words}) + "\n")


def split_at_spaces(path: Path) -> None:
    """The tiny tokenizer takes a whole text for one word."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def run(num_rows: int, unit_rows: int) -> dict[str, Any]:
    """Fills one cache; memory in MiB at each tenth of its units."""
    from distill.config import CacheConfig
    from distill.teacher.job import cache_teacher

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_tiny("Qwen3", folder / "teacher")
        split_at_spaces(folder / "teacher" / "tokenizer.json")
        write_prompts(folder / "texts.jsonl", num_rows)
        config = CacheConfig.model_validate(
            {
                "teacher": str(folder / "teacher"),
                "data": {"texts": [str(folder / "texts.jsonl")]},
                "out": str(folder / "cache"),
                "dtype": "float32",
                "max_length": 64,
                "unit_rows": unit_rows,
                "targets": {"top_k": 16, "hidden_bytes": 16},
                "samples": {"num": 0},
                "engine_options": {"max_num_seqs": 64, "kv_cache_memory_bytes": 64 << 20},
            }
        )
        started = time.monotonic()
        with Watch(folder / "cache" / "commits") as watch:
            result = cache_teacher(config, quiet=True)
        seconds = time.monotonic() - started
    units = -(-num_rows // unit_rows)
    tenths = [
        max((size for done, size in watch.samples if units * n <= 10 * done < units * (n + 1)), default=0) >> 20
        for n in range(10)
    ]
    after_first = [size for size in tenths[1:] if size]
    return {
        "rows": num_rows,
        "targets": result.num_targets,
        "seconds": round(seconds, 1),
        "rss_mib_by_tenth": tenths,
        "growth_after_first_tenth": round(max(after_first) / after_first[0] - 1, 4),
    }


def main() -> None:
    """Prints a table, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--unit-rows", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    results = {"machine": f"{platform.machine()}, vLLM on a CPU", **run(arguments.rows, arguments.unit_rows)}
    for key, value in results.items():
        print(f"{key:28} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
