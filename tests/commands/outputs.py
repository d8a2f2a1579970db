"""What each command prints with ``--json``, as types; ``schemas/commands/`` is made of them and pinned to them."""

from typing import Any, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from distill.cache.plan import Totals
from distill.report.diff import DiffReport
from distill.report.doctor import Check
from distill.report.gc import Garbage
from distill.report.html import HtmlReport
from distill.report.inspect import InspectReport
from distill.report.plan_record import PlanReport
from distill.report.status import StatusReport
from distill.report.verify import Problem
from distill.student.benchmarks import TaskFigures
from distill.student.choices import ChoiceResult
from distill.student.export import Exported
from distill.student.figures import Figures
from distill.student.result import StageResult


class Init(TypedDict):
    """The file that was written."""

    path: str
    preset: str


class CacheTeacher(TypedDict):
    """What this run did; totals are of the sealed cache, null while other workers owe units."""

    cache: str
    sealed: bool
    units_written: int
    targets: int
    seconds: float
    tokens_per_s: float | None
    totals: Totals | None


class Train(TypedDict):
    """The stages, in order."""

    stages: list[StageResult]


class Eval(TypedDict):
    """Held-out figures where there is a cache, choices and lm_eval where they were asked for."""

    student: str
    cache: NotRequired[str | list[str]]
    group_by: NotRequired[str | None]
    tail: NotRequired[str]
    domains: NotRequired[dict[str, Figures]]
    overall: NotRequired[Figures]
    groups: NotRequired[dict[str, Figures]]
    choices: NotRequired[dict[str, ChoiceResult]]
    lm_eval: NotRequired[list[TaskFigures]]


class Verify(TypedDict):
    """What was read and what is wrong; requeued are the units that --repair has asked for again."""

    path: str
    ok: bool
    generation: int
    sealed: bool
    num_units: int
    num_committed: int
    num_rows: int
    num_rejects: int
    num_bytes: int
    problems: list[Problem]
    requeued: list[str]


class Gc(TypedDict):
    """What is garbage, the oldest first, and whether it was deleted; files that are younger may be at work."""

    path: str
    older_than_s: float
    garbage: list[Garbage]
    num_younger: int
    deleted: bool
    num_bytes: int


class Doctor(TypedDict):
    """All that was looked at; ok: nothing failed."""

    ok: bool
    checks: list[Check]


class Launch(TypedDict):
    """The job script."""

    script: str


class Sql(TypedDict):
    """The answer, in full."""

    columns: list[str]
    rows: list[dict[str, Any]]


OUTPUTS: dict[str, Any] = {
    "init": Init,
    "plan": PlanReport,
    "cache-teacher": CacheTeacher,
    "train": Train,
    "eval": Eval,
    "export": Exported,
    "inspect": InspectReport,
    "verify": Verify,
    "status": StatusReport,
    "gc": Gc,
    "diff": DiffReport,
    "doctor": Doctor,
    "launch": Launch,
    "report": HtmlReport,
    "sql": Sql,
}


def schema_of(command: str) -> dict[str, Any]:
    """The JSON Schema of a command's output; keys that it does not name are refused."""
    schema = TypeAdapter(OUTPUTS[command]).json_schema(mode="serialization")
    for part in (schema, *schema.get("$defs", {}).values()):
        if "properties" in part:
            part["additionalProperties"] = False
    return schema
