"""What caches and checkpoints survive: ``python -m benchmarks.faults [--kills 500] [--flips 1000] … [--json FILE]``.

Pairs of writers are killed at random moments and started again until ``kills`` of them died; so are those of a naive
writer, as a control: if it loses nothing, the kills prove nothing. Training is killed, half of the time inside a save.
Eight writers race for the same units, in a folder and in a bucket of a real object store, where writers are killed and
requests fail as well. Then bits are flipped (``flips`` in each kind of file), shards are cut and swapped, a disk is
filled, and files are mutated under right checksums. Exits with 1 where anything went unnoticed or was lost.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.attacks.mutations import fuzz
from tests.faults.damage import damage_shards, fill_the_disk, flip_bits
from tests.faults.races import race
from tests.faults.remote import torture_store
from tests.faults.torture import torture_cache, torture_naive
from tests.faults.training import torture_training

WRITERS = 8
_WRONG = ("failed", "lost", "doubled", "silent", "torn", "problems", "different")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of each is tried."""

    kills: int
    flips: int  # in each kind of file
    mutations: int  # of each kind of file
    train_kills: int
    race_units: int
    store_kills: int
    seed: int


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """All faults, one after the other. What forks comes first: a process with threads must not."""
    figures: dict[str, Any] = {"seed": sizes.seed, "seconds": {}}
    work: dict[str, Callable[[], Any]] = {
        "kills": lambda: torture_cache(folder / "kills", kills=sizes.kills, seed=sizes.seed).as_dict(),
        "naive": lambda: torture_naive(folder / "naive", kills=sizes.kills, seed=sizes.seed).as_dict(),
        "disk_full": lambda: fill_the_disk(folder),
        "race": lambda: race(folder / "race", writers=WRITERS, units=sizes.race_units),
        "training": lambda: torture_training(folder / "training", kills=sizes.train_kills, seed=sizes.seed),
        "store": lambda: torture_store(
            folder / "store", kills=sizes.store_kills, units=sizes.race_units, seed=sizes.seed
        ),
        "flips": lambda: flip_bits(folder, flips=sizes.flips, seed=sizes.seed),
        "shards": lambda: damage_shards(folder, seed=sizes.seed),
        "mutations": lambda: fuzz(folder / "mutations", mutations=sizes.mutations, seed=sizes.seed),
    }
    for name, act in work.items():
        began = time.monotonic()
        figures[name] = act()
        figures["seconds"][name] = round(time.monotonic() - began, 1)
    figures["totals"] = totals(figures)
    figures["ok"] = not failures(figures)
    return figures


def totals(figures: dict[str, Any]) -> dict[str, int]:
    """The figures in one line."""
    store = figures["store"]
    reached = [] if "skipped" in store else [store["kills"], store["race"], store["requests"]]
    parts = [figures["kills"], figures["training"], figures["race"], *reached]
    return {
        "kills_survived": sum(part.get("kills", 0) for part in parts),
        "bits_flipped": sum(item["flips"] for item in figures["flips"].values()),
        "bits_caught": sum(item["caught"] for item in figures["flips"].values()),
        "writers_raced": sum(part.get("writers", 0) for part in parts),
        "requests_failed": sum(part["failed_requests"] for part in reached if "failed_requests" in part),
        "mutations": sum(item["mutations"] for item in figures["mutations"].values()),
        **{name: sum(part.get(name, 0) for part in parts) for name in ("rows", "lost", "doubled", "silent")},
    }


def failures(figures: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    naive, disk, store = figures["naive"], figures["disk_full"], figures["store"]
    found = [] if figures["kills"]["survived"] else ["rows or writers did not survive the kills"]
    if not naive["lost"] + naive["torn"]:
        found.append("the control lost nothing, so the kills prove nothing")
    checked = {"race": figures["race"], "training": figures["training"]}
    if "skipped" not in store:
        checked |= {f"store: {name}": part for name, part in store.items()}
    for name, part in checked.items():
        lost_units = part.get("units", 0) != part.get("winners", 0)
        if lost_units or any(part.get(key) for key in _WRONG):
            found.append(name)
    found += [f"flips in {kind}" for kind, item in figures["flips"].items() if item["caught"] != item["flips"]]
    found += [f"{kind} shards" for kind, item in figures["shards"].items() if item["caught"] != item["shards"]]
    found += [f"mutated {kind}" for kind, item in figures["mutations"].items() if item["wrong"] + item["escaped"]]
    if "skipped" not in disk:
        wrong = [disk[name] for name in ("torn", "rerun_exit_code", "problems_after", "lost", "doubled", "silent")]
        if any(wrong) or disk["exit_code"] != disk["expected_exit_code"] or disk["units_before"] >= disk["units"]:
            found.append("a full disk")
    return found


def table(figures: dict[str, Any]) -> Table:
    """The figures for people."""
    made = Table("fault", "tried", "result", title="faults")
    for name, title in (("kills", "kill -9"), ("naive", "kill -9, naive control")):
        _add_kills(made, title, figures[name])
    _add_race(made, "race in a folder", figures["race"])
    training = figures["training"]
    made.add_row(
        "kill -9 in training",
        f"{training['kills']} kills, {training['in_a_save']} of them in a save, {training['runs']} runs",
        f"{training['different']} other losses or weights, {training['failed']} failed",
    )
    store = figures["store"]
    if "skipped" in store:
        made.add_row("object store", "skipped", store["skipped"])
    else:
        _add_kills(made, "kill -9, cache in a bucket", store["kills"])
        _add_race(made, "race in a bucket", store["race"])
        item = store["requests"]
        made.add_row("failed requests", f"{item['failed_requests']} for {item['caches']} caches", _lost(item))
    for kind, item in figures["flips"].items():
        made.add_row(f"bit flip, {kind}", str(item["flips"]), f"{item['caught']} caught")
    for kind, item in figures["shards"].items():
        made.add_row(f"{kind} shard", str(item["shards"]), f"{item['caught']} caught")
    for kind, item in figures["mutations"].items():
        result = f"{item['refused']} refused, {item['harmless']} harmless, {item['changed']} vouched for, "
        made.add_row(f"mutated {kind}", str(item["mutations"]), f"{result}{item['wrong'] + item['escaped']} bad")
    disk = figures["disk_full"]
    if "skipped" in disk:
        made.add_row("disk full", "skipped", disk["skipped"])
    else:
        result = f"exit {disk['exit_code']} in {disk['seconds']} s; rerun: exit {disk['rerun_exit_code']}, "
        made.add_row("disk full", f"at unit {disk['units_before']} of {disk['units']}", result + _lost(disk))
    return made


def _lost(item: dict[str, Any]) -> str:
    return f"{item['lost']} lost, {item['doubled']} doubled, {item['silent']} silent"


def _add_kills(made: Table, title: str, item: dict[str, Any]) -> None:
    tried = f"{item['kills']} kills, {item['writers']} writers raced on {item['caches']} caches of "
    made.add_row(title, f"{tried}{item['rows']} rows in all", f"{_lost(item)}, {item['torn']} torn shards")


def _add_race(made: Table, title: str, item: dict[str, Any]) -> None:
    tried = f"{item['writers']} writers on the same {item['units']} units, {item['contested']} contested"
    made.add_row(title, tried, f"{item['winners']} with one winner, {_lost(item)}")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--flips", type=int, default=1000, help="in each kind of file")
    parser.add_argument("--mutations", type=int, default=1000, help="of each kind of file")
    parser.add_argument("--train-kills", type=int, default=50)
    parser.add_argument("--race-units", type=int, default=100, help="that eight writers race for")
    parser.add_argument("--store-kills", type=int, default=50, help="with the cache in an object store")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = vars(parser.parse_args())
    path = arguments.pop("json")
    with tempfile.TemporaryDirectory(prefix="distill-faults-") as folder:
        figures = measure(Path(folder), Sizes(**arguments))
    Console(width=120).print(table(figures))
    for failure in failures(figures):
        print(f"FAILED: {failure}")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
