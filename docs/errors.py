"""The source of the package flows in, docs/errors.md flows out: every error a user can meet, with what to do about it.

    python -m docs.errors

Rows come from the places that make an error; new ones need no writing. ``docs.provoking`` records the test of each.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill import errors

ROOT = Path(__file__).parent.parent
PACKAGE, PAGE, RECORD = ROOT / "distill", ROOT / "docs" / "errors.md", ROOT / "docs" / "provoked.json"
CODES = {
    name: value.exit_code
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.DistillError)
}
ROOMS = {
    "": "Configuration",
    "data": "Data",
    "teacher": "The teacher's run",
    "cache": "The cache",
    "student": "Training",
    "report": "Looking",
    "commands": "Commands",
    "launch": "Many machines",
}
HEAD = """# Errors

Every error that `distill` raises on purpose, by where it arises; … stands for what differs. A message is one paragraph:
what is wrong, where, and the way out, which the third column repeats. The command line prints it and exits with the
code; a program catches `distill.DistillError` or the class of the code.

| code | class | means |
|---|---|---|
"""
ADVICE = """
[Troubleshooting](troubleshooting.md) has more on the frequent ones. A traceback instead of such a paragraph is a bug
of ours. The last column names a test that provokes the error, or says why none can. This page is made by
`python -m docs.errors` from the source and from `docs/provoked.json`, which a run of the tests with
`python -m pytest -p docs.provoking` records; a test asks for a test, or a reason, for each error.
"""
# Tests that provoke an error in a process of their own, where nothing is recorded.
BY_PROCESS: dict[str, str] = {
    "teacher/job.py: …": "tests/teacher/test_workers.py::test_a_stopped_worker_exits_75_and_the_next_run_finishes",
    "student/feed.py: distill.batches was given to a DataLoader with workers, each of which would yield every batch.": (
        "tests/student/test_feed.py::test_a_data_loader_hands_batches_on_and_its_workers_are_refused"
    ),
    "student/ranks.py: another process of this run is gone or unreachable: ….": (
        "tests/student/test_ranks.py::test_a_killed_run_goes_on_with_another_number_of_ranks"
    ),
    "student/sharding.py: … cannot be trained with parallel fsdp.": (
        "tests/student/test_ranks.py::test_what_cannot_be_sharded_is_refused_on_all_ranks"
    ),
}
# Why no test provokes an error.
UNPROVOKED = {
    "cache/bucket.py: the local disk is full: … cannot be fetched to ….": "needs a full temporary folder",
    "cache/bucket.py: …/… cannot be written: ….": "the store of the tests makes missing buckets by itself",
    "cache/storage.py: …/… cannot be written: ….": "the store of the tests makes missing buckets by itself",
    "student/learner.py: … belongs to another student: it has ….": "only a checkpoint with forged hashes gets there",
    "teacher/on_ray.py: …: … of … units are still missing, and no worker is left.": (
        "workers would have to end well and leave units"
    ),
    "teacher/on_ray.py: …": "Ctrl-C on a Ray cluster; the signal itself is sent in tests/launch/test_ray_cluster.py",
    "teacher/vllm_engine.py: vllm …: ….": "needs pipeline parallelism, or a compiling vllm on a GPU",
    "teacher/vllm_engine.py: The vllm engine finished … sequences without all their positions captured.": (
        "needs a vllm that loses a prompt"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place in the source that makes an error."""

    module: str  # cache/reader.py
    kind: str
    text: str  # all of the message, with … for what is known only when it runs
    says: str  # what is wrong
    fix: str  # what to do; empty where the message is one sentence
    lines: range  # of the source
    carried: bool  # a ValueError that pydantic puts into a UsageError

    @property
    def key(self) -> str:
        """What tells it apart in the page."""
        return f"{self.module}: {_cell(self.says)}"


def sites() -> list[Site]:
    """All of them, in the order of files and lines; equal messages of a module once."""
    found: dict[str, Site] = {}
    for site in every_site():
        found.setdefault(site.key, site)
    return list(found.values())


def every_site() -> Iterator[Site]:
    """As ``sites``, and equal messages as often as they are."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        yield from _sites_of(module, ast.parse(path.read_text(encoding="utf-8")))


def _sites_of(module: str, tree: ast.Module) -> Iterator[Site]:
    constants: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr):
            constants |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        carried = node.func.id == "ValueError" and module == "config.py"
        kind = "UsageError" if carried else node.func.id
        if kind in CODES:
            text = " ".join(_text(node.args[0], constants).split())
            says, fix = _split(text)
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            yield Site(module=module, kind=kind, text=text, says=says, fix=fix, lines=lines, carried=carried)


def _text(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """The text of an expression, with … for what is known only when it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return _text(constants[node.id], {name: value for name, value in constants.items() if name != node.id})
    return "…"


def _split(text: str) -> tuple[str, str]:
    """What is wrong and what to do: the first sentence and the others."""
    end = re.search(r"(?<!e\.g)[.;] (?=[A-Z`])", text)
    return (text[: end.start() + 1], text[end.end() :]) if end else (text, "")


def provoked() -> dict[str, str]:
    """The test of each error that a recorded run of the tests provoked, by ``Site.key``."""
    known: dict[str, str] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return known


def exists(test: str) -> bool:
    """Whether there is such a test."""
    file, _, function = test.partition("::")
    path = ROOT / file
    return path.is_file() and f"def {function.partition('[')[0]}(" in path.read_text(encoding="utf-8")


def page() -> str:
    """The page."""
    lines = [HEAD.rstrip("\n")]
    for name, code in CODES.items():
        if name != "DistillError":
            meaning = (getattr(errors, name).__doc__ or "").partition(" (exit")[0].rstrip(".")
            lines.append(f"| {code} | `{name}` | {meaning} |")
    lines.append(ADVICE.rstrip("\n"))
    rows, tests = sites(), provoked() | BY_PROCESS
    for room, title in ROOMS.items():
        members = [site for site in rows if _room(site) == room]
        if not members:
            continue
        lines += ["", f"## {title}", "", "| where | it says | code | what to do | test |", "|---|---|---|---|---|"]
        for site in members:
            says, fix = _cell(site.says), _cell(site.fix) or "as it says"
            named = f"`{tests[site.key]}`" if site.key in tests else f"none: {UNPROVOKED.get(site.key, '—')}"
            lines.append(f"| `{site.module}` | {says} | {CODES[site.kind]} | {fix} | {named} |")
    return "\n".join(lines) + "\n"


def _room(site: Site) -> str:
    room = site.module.partition("/")[0] if "/" in site.module else ""
    return room if room in ROOMS else ""


def _cell(text: str) -> str:
    return re.sub(r"([|<*])", r"\\\1", text)


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")
    tests = provoked() | BY_PROCESS
    print(f"{PAGE}: {len(sites())} errors, {sum(site.key in tests for site in sites())} of them provoked by a test")


if __name__ == "__main__":
    main()
