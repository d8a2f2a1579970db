"""The files in schemas/ say what the code writes, and the code writes what they say."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pytest
from pydantic import BaseModel

from distill.cache import generations
from distill.cache.codec import ROUNDING
from distill.cache.plan import Commit, Manifest, Plan, Repair
from distill.cache.schema import Layout, row_schema, values_per_row

SCHEMAS = Path(__file__).parents[2] / "schemas"
MODELS: dict[str, type[BaseModel]] = {"plan": Plan, "commit": Commit, "manifest": Manifest, "repair": Repair}
CHECKSUM = {
    "description": "SHA-256 of all bytes of the file before the comma that precedes this member",
    "pattern": "^[0-9a-f]{64}$",
    "type": "string",
}


def load(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    return schema


@pytest.mark.parametrize("name", MODELS)
def test_schemas_are_those_of_the_models(name: str) -> None:
    schema = MODELS[name].model_json_schema(mode="serialization")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["checksum"] = CHECKSUM
    schema["required"] = [*schema["required"], "checksum"]
    assert load(name) == schema


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("plan", "plan.json"),
        ("commit", "commits/00000.json"),
        ("manifest", "manifest.json"),
        ("repair", "repairs/2.json"),
    ],
)
def test_written_files_validate_and_altered_ones_do_not(cache: Path, name: str, file: str) -> None:
    generations.request(cache, after=1, units={"00000": "its shard is missing"})
    validator = jsonschema.Draft202012Validator(load(name))
    validator.check_schema(load(name))
    instance = json.loads((cache / file).read_text())
    validator.validate(instance)
    for member in instance:
        assert not validator.is_valid({key: value for key, value in instance.items() if key != member}), member
    assert not validator.is_valid({**instance, "surprise": 1})


def neutral(kind: pa.DataType) -> str:
    """An Arrow type in the words of row.json."""
    if pa.types.is_dictionary(kind):
        return f"dictionary<{neutral(kind.value_type)}>"
    if pa.types.is_map(kind):
        return f"map<{neutral(kind.key_type)}, {neutral(kind.item_type)}>"
    if pa.types.is_list(kind):
        return f"list<{neutral(kind.value_type)}>"
    return {"float": "float32"}.get(str(kind), str(kind))


def length(name: str, layout: Layout) -> str:
    """A list's length in the words of row.json."""
    if name == "input_ids":
        return "L"
    if name.startswith("hidden_"):
        return f"(L-1)*r_{name.removeprefix('hidden_')}"
    per_target, extra = values_per_row(layout)[name]
    assert extra == 0
    return {1: "L-1", layout.top_k: "(L-1)*k", len(layout.temperatures): "(L-1)*n_T"}[per_target]


def test_row_schema_is_that_of_the_code() -> None:
    layout = Layout(top_k=64, temperatures=(4.0, 2.0, 1.0), widths=((8, 10), (6, 20), (4, 30), (2, 40)))
    expected = []
    for field in row_schema(layout):
        assert not field.nullable
        column = {"name": field.name, "type": neutral(field.type)}
        if pa.types.is_list(field.type):
            column["length"] = length(field.name, layout)
        if field.name in ROUNDING:
            column["rounding"] = f"2^-{ROUNDING[field.name]}"
        if field.name.startswith("hidden_"):
            column["optional"] = True
        expected.append(column)
    columns = load("row")["columns"]
    kept = [{key: value for key, value in column.items() if key not in ("description", "unit")} for column in columns]
    assert kept == expected
    assert all(column["description"] for column in columns)
