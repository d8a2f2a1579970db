"""The schemas of schemas/ flow in, docs/schemas.md flows out: keys of the configuration, files of a cache, ``--json``.

python -m docs.schemas
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "schemas.md"
HEAD = """# Schemas

Every key of the configuration, every field of a cache's files and of what commands print with `--json`, from
`schemas/`, which has them for machines. Unknown keys are refused everywhere. This page is made by
`python -m docs.schemas`, and a test compares it with the schemas; how the fields work together is in
[the format](format.md), [stages](stages.md) and [losses](losses.md).
"""
COMMANDS = """## What commands print

Every command takes `--json`: it then prints one object, and nothing else, on standard output; progress and errors stay
on standard error, and exit codes are the same. `schemas/commands/` has a schema for each command, which also says what
is in the records named here. A key may be missing where it is marked so; null stands for numbers that JSON lacks.
"""
CONFIGURATION = (
    ("cache", "config.json", "CacheConfig"),
    ("cache.targets", "config.json", "TargetsConfig"),
    ("cache.columns", "config.json", "ColumnsConfig"),
    ("cache.generate", "config.json", "GenerateConfig"),
    ("cache.samples", "config.json", "SamplesConfig"),
    ("train", "config.json", "TrainConfig"),
    ("train.lora", "config.json", "LoraConfig"),
    ("train.stages.N", "stage.json", None),
    ("train.stages.N.weights", "stage.json", "WeightsConfig"),
    ("train.stages.N.shares.DOMAIN", "stage.json", "ShareConfig"),
    ("train.stages.N.temperature_steps", "stage.json", "TemperatureSteps"),
)
RECORDS = (
    ("plan.json", "plan.json", None),
    ("identity", "plan.json", "Identity"),
    ("recorded", "plan.json", "Recorded"),
    ("sources[]", "plan.json", "Source"),
    ("units[]", "plan.json", "Unit"),
    ("commits/UNIT.json", "commit.json", None),
    ("manifest.json", "manifest.json", None),
    ("totals", "manifest.json", "Totals"),
    ("repairs/GENERATION.json", "repair.json", None),
)


def page() -> str:
    """The page."""
    lines = [HEAD, "## The configuration", ""]
    lines += ["`--set KEY.KEY=VALUE` reaches each of them; options of the command line come before the file.", ""]
    for title, file, name in CONFIGURATION:
        lines += _section(title, file, name, columns=("key", "type", "default", "what"))
    lines += ["## Records of a cache", "", "Counts are `{train, eval}`.", ""]
    for title, file, name in RECORDS:
        lines += _section(title, file, name, columns=("field", "type", "default", "what"))
    lines += ["## A row of a shard", "", *_row(), "", COMMANDS]
    for path in sorted((ROOT / "schemas" / "commands").glob("*.json")):
        lines += _output(path.stem)
    return "\n".join(lines).rstrip("\n") + "\n"


def _output(command: str) -> list[str]:
    schema = _read(f"commands/{command}.json")
    lines = [
        f"### `distill {command} --json`",
        "",
        _plain(schema.get("description", "")),
        "",
        "| key | type |",
        "|---|---|",
    ]
    for key, value in schema["properties"].items():
        missing = "" if key in schema["required"] else ", may be missing"
        lines.append(f"| `{key}` | {_type(value)}{missing} |")
    return [*lines, ""]


def _section(title: str, file: str, name: str | None, *, columns: tuple[str, ...]) -> list[str]:
    schema = _read(file)
    found = schema if name is None else schema["$defs"][name]
    lines = [f"### `{title}`", "", _plain(found.get("description", "")), ""]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    required = found.get("required", [])
    for key, value in found["properties"].items():
        default = f"`{json.dumps(value['default'])}`" if "default" in value else "empty"
        if key in required and "default" not in value:
            default = "the stage's" if title == "train.stages.N" else "required"
        lines.append(f"| `{key}` | {_type(value)} | {_plain(default)} | {_plain(value.get('description', ''))} |")
    return [*lines, ""]


def _row() -> list[str]:
    schema = _read("row.json")
    lines = [_plain(schema["description"]), "", "| column | type | length | what |", "|---|---|---|---|"]
    for column in schema["columns"]:
        notes = ["may be absent"] if column.get("optional") else []
        notes += [f"in {column['unit']}"] if "unit" in column else []
        notes += [f"multiples of {column['rounding']}"] if "rounding" in column else []
        what = "; ".join([column["description"], *notes])
        length = f"`{column['length']}`" if "length" in column else ""
        lines.append(f"| `{column['name']}` | `{column['type']}` | {length} | {what} |")
    return lines


def _type(value: dict[str, Any]) -> str:
    """A JSON type for people."""
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_type(one) for one in value["anyOf"]))
    if "$ref" in value or "const" in value or "enum" in value:
        choices = [value["const"]] if "const" in value else value.get("enum", [])
        return ", ".join(f"`{one}`" for one in choices) or value["$ref"].rpartition("/")[2]
    kind = value.get("type", "any")
    if kind in ("array", "object"):
        inner = value.get("items" if kind == "array" else "additionalProperties")
        words = ("list", "list of") if kind == "array" else ("map", "map to")
        return f"{words[1]} {_type(inner)}" if isinstance(inner, dict) and inner else words[0]
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {value[name]:g}" for name, sign in limits.items() if name in value]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def _read(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "schemas" / file).read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
