"""A run's folder flows in, what its student last said to each prompt flows out as a table, beside the reference.

Lines of ``samples.jsonl`` that a killed process left torn are passed over.
"""

from pathlib import Path
from typing import Any

from distill.report.curves import records_of, stage_folders
from distill.report.page import Table

_CUT = 600  # characters of a text


def answers_table(run: Path) -> Table:
    """For each prompt the reference, and what each stage said at its last evaluation; no rows where none was asked."""
    said: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for folder in stage_folders(run):
        lines = _lines(folder / "samples.jsonl")
        last = max((line["step"] for line in lines), default=0)
        for line in lines:
            if line["step"] == last:
                answers = said.setdefault((line["domain"], line["prompt"]), [(line["author"], line["reference"])])
                answers.append((f"{folder.name}, step {last}", line["student"]))
    rows = [
        (*((domain, _cut(prompt)) if number == 0 else ("", "")), who, _cut(text))
        for (domain, prompt), answers in said.items()
        for number, (who, text) in enumerate(answers)
    ]
    return Table(title="What the student says", header=("domain", "prompt", "", "answer"), rows=tuple(rows), texts=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    wanted = {"prompt", "student", "author", "reference", "domain"}
    if not path.is_file():
        return []
    return [{**line, **{key: str(line[key]) for key in wanted}} for line in records_of(path) if wanted <= line.keys()]


def _cut(text: str) -> str:
    return text if len(text) <= _CUT else text[: _CUT - 1] + "…"
