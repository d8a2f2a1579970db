"""The files in schemas/ say what the code writes, and the code writes what they say."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from distill.cache import generations
from distill.cache.codec import ROUNDING, SAMPLED
from distill.cache.plan import Commit, Heads, Identity, Manifest, Plan, Repair
from distill.cache.schema import Layout, layer_columns, row_schema, values_per_row

SCHEMAS = Path(__file__).parents[2] / "schemas"
MODELS: dict[str, type] = {"plan": Plan, "commit": Commit, "manifest": Manifest, "repair": Repair}
CHECKSUM = {
    "description": "SHA-256 of all bytes of the file before the comma that precedes this member",
    "pattern": "^[0-9a-f]{64}$",
    "type": "string",
}

# Only what names the columns of inner layers; the rest of an identity is of no concern here.
HEADS = Identity.model_construct(
    layers=(3,), layer_bytes=64, heads=(Heads(layer=7, heads=(0, 3, 4), kv_heads=(0, 1), head_dim=16),)
)


def load(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    return schema


def of_model(name: str) -> dict[str, Any]:
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    schema: dict[str, Any] = draft | TypeAdapter(MODELS[name]).json_schema(mode="serialization")
    schema["properties"]["checksum"] = CHECKSUM
    schema["required"] = [*schema["required"], "checksum"]
    return schema


@pytest.mark.parametrize("name", MODELS)
def test_schemas_are_those_of_the_models(name: str) -> None:
    assert load(name) == of_model(name)


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
    if name in SAMPLED:
        return "n"
    for kept in HEADS.heads:
        sizes = {"q": "H*d", "q_scale": "H", "k": "G*d", "k_scale": "G"}
        if name.startswith(f"layer{kept.layer}_"):
            return f"(L-1)*{sizes[name.removeprefix(f'layer{kept.layer}_')]}"
    if name.startswith("layer"):
        return "(L-1)*layer_bytes"
    per_target, extra = values_per_row(layout)[name]
    assert extra == 0
    return {1: "L-1", layout.top_k: "(L-1)*k", len(layout.temperatures): "(L-1)*n_T"}[per_target]


def test_row_schema_is_that_of_the_code() -> None:
    columns = layer_columns(HEADS)
    layout = Layout(
        top_k=64,
        temperatures=(4.0, 2.0, 1.0),
        widths=((8, 10), (6, 20), (4, 30), (2, 40)),
        num_samples=50,
        layer_columns=columns,
    )
    expected = []
    for field in row_schema(layout):
        assert not field.nullable
        column: dict[str, Any] = {"name": re.sub(r"^layer\d+", "layer<i>", field.name), "type": neutral(field.type)}
        if pa.types.is_list(field.type):
            column["length"] = length(field.name, layout)
        if field.name in ROUNDING:
            column["rounding"] = f"2^-{ROUNDING[field.name]}"
        if field.name.startswith(("hidden_", "layer", "sampled_")):
            column["optional"] = True
        expected.append(column)
    columns = load("row")["columns"]
    kept = [{key: value for key, value in column.items() if key not in ("description", "unit")} for column in columns]
    assert kept == expected
    assert all(column["description"] for column in columns)


if __name__ == "__main__":
    for name in MODELS:
        (SCHEMAS / f"{name}.json").write_text(json.dumps(of_model(name), indent=2) + "\n")
