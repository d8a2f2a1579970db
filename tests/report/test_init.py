"""Presets are configurations that the models accept, init writes them without ever losing a user's file."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import distill
from distill.__main__ import app
from distill.commands.init import PRESETS, write_preset
from distill.config import CacheConfig, TrainConfig, read_section, validated
from distill.errors import StorageError, UsageError

ROOT = Path(__file__).parents[2]
FOLDER = Path(distill.__file__).parent / "presets"


def test_every_preset_is_named() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_serve_every_stage(preset: str, tmp_path: Path) -> None:
    path = write_preset(preset, tmp_path / "new" / "job.yaml")
    cache = validated(CacheConfig, read_section(path, "cache"), origin=str(path))
    train = validated(TrainConfig, read_section(path, "train"), origin=str(path))
    assert train.cache == cache.out
    for number in (1, 2, 3):
        stage = train.stage(number)
        assert stage.temperature in cache.targets.temperatures
        assert set(stage.shares) <= set(cache.data)
        assert not stage.weights.feature or cache.targets.hidden_bytes
    assert train.max_length <= cache.max_length
    text = path.read_text(encoding="utf-8")
    assert f"distill train --stage 1-3 --config {path}\n" in text
    assert f"{preset}.yaml" not in text


def test_the_example_is_its_preset() -> None:
    example, preset = ROOT / "examples" / "qwen72b-to-7b.yaml", FOLDER / "qwen72b-to-7b.yaml"
    assert example.read_text(encoding="utf-8") == preset.read_text(encoding="utf-8")


def test_stages_that_the_large_preset_writes_out_are_the_defaults() -> None:
    values = yaml.safe_load((FOLDER / "qwen72b-to-7b.yaml").read_text(encoding="utf-8"))["train"]
    written = TrainConfig.model_validate(values)
    defaults = TrainConfig.model_validate({**values, "stages": {}})
    assert [written.stage(number) for number in (1, 2, 3)] == [defaults.stage(number) for number in (1, 2, 3)]


def test_the_command_says_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", "--preset", "tiny-cpu"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "distill cache-teacher --config tiny-cpu.yaml" in done.stdout
    assert (tmp_path / "tiny-cpu.yaml").read_bytes() == (FOLDER / "tiny-cpu.yaml").read_bytes()


def test_nothing_is_overwritten_and_wrong_names_are_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        write_preset("tiny-cpu", path)
    assert path.read_text() == "mine"
    with pytest.raises(UsageError, match="qwen3-32b-to-4b"):
        write_preset("qwen", None)
    with pytest.raises(StorageError, match="cannot write"):
        write_preset("tiny-cpu", path / "below-a-file.yaml")
