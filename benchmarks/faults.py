"""What a cache survives: ``python -m benchmarks.faults [--kills 500] [--flips 1000] [--seed 0] [--json FILE]``.

Pairs of writers are killed at random moments and started again until ``kills`` of them died; so are those of a naive
writer, as a control: if it loses nothing, the kills prove nothing. Then bits are flipped (``flips`` in each kind of
file), shards are cut and swapped, and a disk is filled. Exits with 1 where anything went unnoticed or was lost.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.damage import damage_shards, fill_the_disk, flip_bits
from tests.faults.torture import torture_cache, torture_naive


def measure(folder: Path, *, kills: int, flips: int, seed: int) -> dict[str, Any]:
    """All faults, one after the other. What forks comes first: a process with threads must not."""
    figures: dict[str, Any] = {"seed": seed, "seconds": {}}
    for name, work in (
        ("kills", lambda: torture_cache(folder / "kills", kills=kills, seed=seed).as_dict()),
        ("naive", lambda: torture_naive(folder / "naive", kills=kills, seed=seed).as_dict()),
        ("disk_full", lambda: fill_the_disk(folder)),
        ("flips", lambda: flip_bits(folder, flips=flips, seed=seed)),
        ("shards", lambda: damage_shards(folder, seed=seed)),
    ):
        began = time.monotonic()
        figures[name] = work()
        figures["seconds"][name] = round(time.monotonic() - began, 1)
    figures["ok"] = not failures(figures)
    return figures


def failures(figures: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    naive, disk = figures["naive"], figures["disk_full"]
    found = [] if figures["kills"]["survived"] else ["rows or writers did not survive the kills"]
    if not naive["lost"] + naive["torn"]:
        found.append("the control lost nothing, so the kills prove nothing")
    found += [f"flips in {kind}" for kind, item in figures["flips"].items() if item["caught"] != item["flips"]]
    found += [f"{kind} shards" for kind, item in figures["shards"].items() if item["caught"] != item["shards"]]
    if "skipped" not in disk:
        wrong = [disk[name] for name in ("torn", "rerun_exit_code", "problems_after", "lost", "doubled", "silent")]
        if any(wrong) or disk["exit_code"] != disk["expected_exit_code"] or disk["units_before"] >= disk["units"]:
            found.append("a full disk")
    return found


def table(figures: dict[str, Any]) -> Table:
    """The figures for people."""
    made = Table("fault", "tried", "result", title="faults")
    for name, title in (("kills", "kill -9"), ("naive", "kill -9, naive control")):
        item = figures[name]
        made.add_row(
            title,
            f"{item['kills']} kills, {item['writers']} writers raced on {item['caches']} caches of "
            f"{item['rows']} rows in all",
            f"{item['lost']} lost, {item['doubled']} doubled, {item['silent']} silent, {item['torn']} torn shards",
        )
    for kind, item in figures["flips"].items():
        made.add_row(f"bit flip, {kind}", str(item["flips"]), f"{item['caught']} caught")
    for kind, item in figures["shards"].items():
        made.add_row(f"{kind} shard", str(item["shards"]), f"{item['caught']} caught")
    disk = figures["disk_full"]
    if "skipped" in disk:
        made.add_row("disk full", "skipped", disk["skipped"])
    else:
        result = f"exit {disk['exit_code']} in {disk['seconds']} s; rerun: exit {disk['rerun_exit_code']}, "
        result += f"{disk['lost']} lost, {disk['doubled']} doubled, {disk['silent']} silent"
        made.add_row("disk full", f"at unit {disk['units_before']} of {disk['units']}", result)
    return made


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--flips", type=int, default=1000, help="in each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distill-faults-") as folder:
        figures = measure(Path(folder), kills=arguments.kills, flips=arguments.flips, seed=arguments.seed)
    Console(width=120).print(table(figures))
    for failure in failures(figures):
        print(f"FAILED: {failure}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
