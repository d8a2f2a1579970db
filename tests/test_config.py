"""Configuration: unknown keys, did-you-mean, stage defaults, and schemas/ pinned to the models both ways.

To write the schemas anew after a change of the models: ``python -m tests.test_config``.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from distill.config import CacheConfig, JobConfig, StageConfig, TrainConfig, read_section, validated
from distill.errors import UsageError

ROOT = Path(__file__).parent.parent
SCHEMAS: dict[str, type[BaseModel]] = {"config.json": JobConfig, "stage.json": StageConfig}
TRAIN = {"cache": "c", "student": "s", "out": "o"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_files_equal_the_models(name: str) -> None:
    assert json.loads((ROOT / "schemas" / name).read_text()) == SCHEMAS[name].model_json_schema()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_valid_by_the_schema_and_by_the_models(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    content["cache"].setdefault("teacher", "given on the command line")
    content["train"].setdefault("student", "given on the command line")
    stages = content["train"].pop("stages")
    # JSON has no numbers as keys, so the schema sees the stages' numbers as text.
    jsonschema.validate(
        {**content, "train": {**content["train"], "stages": {str(n): s for n, s in stages.items()}}},
        json.loads((ROOT / "schemas" / "config.json").read_text()),
    )
    content["train"]["stages"] = stages
    job = JobConfig.model_validate(content)
    assert job.train is not None
    schema = json.loads((ROOT / "schemas" / "stage.json").read_text())
    for number in (1, 2, 3):
        jsonschema.validate(job.train.stage(number).model_dump(mode="json"), schema)


def test_the_big_example_writes_the_defaults_out() -> None:
    """The example shows every stage's defaults; it must not drift from them."""
    train = yaml.safe_load((ROOT / "examples" / "qwen72b-to-7b.yaml").read_text())["train"]
    written, default = TrainConfig.model_validate(train), TrainConfig.model_validate(TRAIN)
    for number in (1, 2, 3):
        assert written.stage(number) == default.stage(number)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"studnet": "x"}, "unknown key 'studnet' (did you mean 'student'?)"),
        ({"lora": {"ranks": 1}}, "unknown key 'lora.ranks' (known keys: r, alpha"),
        ({"stages": {2: {"weights": {"k": 1}}}}, "stages.2: unknown key 'weights.k' (did you mean 'kl'?)"),
        ({"stages": {4: {}}}, "stages 1, 2 and 3, no 4"),
        ({"stages": {1: {"temperature": 0}}}, "'temperature': Input should be greater than 0"),
        ({"tune": "adapters"}, "'tune': Input should be 'lora' or 'full'"),
    ],
)
def test_wrong_keys_are_named_with_the_nearest_right_one(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        validated(TrainConfig, {**TRAIN, **values}, origin="train.yaml")
    assert says in str(caught.value)
    assert str(caught.value).startswith("train.yaml: ")


@pytest.mark.parametrize("temperatures", [[], [0], [-1, 2], [2, 2]])
def test_temperatures_are_positive_and_distinct(temperatures: list[float]) -> None:
    values = {"teacher": "t", "data": {"d": ["x"]}, "out": "o", "targets": {"temperatures": temperatures}}
    with pytest.raises(UsageError, match="distinct and greater than 0"):
        validated(CacheConfig, values, origin="options")


def test_user_weights_lie_over_defaults_and_shares_replace_them() -> None:
    stages = {2: {"weights": {"feature": 0}, "shares": {"law": 1}}}
    stage = validated(TrainConfig, {**TRAIN, "stages": stages}, origin="x").stage(2)
    assert (stage.weights.kl, stage.weights.ce, stage.weights.feature) == (0.7, 0.3, 0.0)
    assert list(stage.shares) == ["law"]
    assert validated(TrainConfig, {**TRAIN, "domain": "law"}, origin="x").stage(3).shares.keys() == {"law"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cache: [", "not valid YAML"),
        ("- 1", "must be a mapping"),
        ("trian: {}", "did you mean 'train'"),
        (None, "cannot read"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "job.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_section(path, "train")


if __name__ == "__main__":
    for name, model in SCHEMAS.items():
        (ROOT / "schemas" / name).write_text(json.dumps(model.model_json_schema(), indent=2) + "\n")
