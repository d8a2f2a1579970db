"""Options that several commands share, and how options, ``--set`` and a file become one configuration."""

import functools
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperOption

from distill.errors import UsageError

Config = Annotated[Path | None, typer.Option("--config", help="YAML file; options override it.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY.KEY=VALUE, any key of the configuration.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of the cache.")]

_MODEL_FILES = ("config.json", "adapter_config.json", "state.json")  # of a model, an adapter, a checkpoint


class Plain(TyperCommand):
    """A command whose help tells options that take a value from switches, and leaves types to the words."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for option in self.params:
            if isinstance(option, TyperOption) and option.metavar is None:
                option.metavar = "" if option.is_flag else "VALUE"


def configuration(
    model: Any,
    section: Literal["cache", "train"],
    path: Path | None,
    options: dict[str, Any],
    settings: list[str] | None,
) -> Any:
    """The file's section, overridden by options, overridden by --set, validated."""
    from distill.config import validated

    return validated(
        model, section_values(section, path, options, settings), origin=origin_of_settings(path, options, settings)
    )


def section_values(
    section: Literal["cache", "train"], path: Path | None, options: dict[str, Any], settings: list[str] | None
) -> dict[str, Any]:
    """The file's section, overridden by options, overridden by --set, as plain data."""
    from distill.config import read_section

    values = _merged(read_section(path, section), given(options))
    for item in settings or []:
        key, text = pair(item, "--set", "VALUE")
        values = _merged(values, _nested(key.split("."), _yaml_value(text)))
    return values


def origin_of_settings(path: Path | None, options: dict[str, Any], settings: list[str] | None) -> str:
    """Where a wrong key may stand: "job.yaml", "the options", or "job.yaml and the options"."""
    said = ["the options"] if given(options) or settings or path is None else []
    return " and ".join([*([] if path is None else [str(path)]), *said])


def with_options_of(read: Callable[..., Any], **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of ``read`` beside its own; what ``read`` makes of them is its first argument.

    ``defaults`` stand in for those of ``read``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        theirs = [
            parameter.replace(default=defaults.get(name, parameter.default))
            for name, parameter in inspect.signature(read).parameters.items()
        ]
        own = list(inspect.signature(command).parameters.values())[1:]

        @functools.wraps(command)
        def both(**values: Any) -> None:
            command(read(**{parameter.name: values.pop(parameter.name) for parameter in theirs}), **values)

        # What typer reads. The first argument is no option, and its type may not be loaded yet.
        both.__signature__ = inspect.Signature([*theirs, *own])  # type: ignore[attr-defined]
        both.__annotations__ = {parameter.name: parameter.annotation for parameter in (*theirs, *own)}
        return both

    return decorate


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def given(values: dict[str, Any]) -> dict[str, Any]:
    """What the user gave, without what was left out."""
    return {key: value for key, value in values.items() if value is not None and value != {}}


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    """``stages.2.temperature`` and a value as nested dictionaries; numbers are keys of stages."""
    key: Any = int(keys[0]) if keys[0].isdigit() else keys[0]
    return {key: _nested(keys[1:], value) if len(keys) > 1 else value}


def _yaml_value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set: '{text}' is not a YAML value: {error}.") from error


def pair(item: str, option: str, what: str) -> tuple[str, str]:
    """``KEY=VALUE`` of an option, apart; UsageError for anything else."""
    key, equals, value = item.partition("=")
    if not (key and equals and value):
        raise UsageError(f"{option} takes KEY={what}, got '{item}'.")
    return key, value


def one_or_many(values: list[str] | None) -> str | list[str] | None:
    """A repeatable option as the configuration has it: one value plainly, several as a list."""
    return values[0] if values and len(values) == 1 else values or None


def checkpoint(name: str) -> str:
    """A model as it was named; a stage's folder stands for its best checkpoint.

    Raises UsageError for a run, and for a stage that has no best checkpoint.
    """
    folder = Path(name)
    if (folder / "best").is_dir():
        return str(folder / "best")
    if any((folder / file).is_file() for file in _MODEL_FILES):
        return name
    _refuse_unfinished(folder)
    return name


def _refuse_unfinished(folder: Path) -> None:
    """Raise UsageError for a run, or for a stage without a best checkpoint; name the checkpoint that can be used."""
    stages = [folder / f"stage{number}" for number in (3, 2, 1)]
    if any(stage.is_dir() for stage in stages):
        usable = [found for stage in stages if (found := _newest_of(stage)) is not None]
        if not usable:
            raise UsageError(f"{folder} is a run without a checkpoint. Train it first, or name another student.")
        raise UsageError(f"{folder} is a run. Name one of its stages, such as {usable[0]}.")
    last = _newest_of(folder)
    if last is not None:
        raise UsageError(f"the stage {folder} has no best checkpoint yet. Name {last}, or train it on first.")
    if folder.is_dir() and folder.name in {stage.name for stage in stages}:
        raise UsageError(f"the stage {folder} has no checkpoint yet. Train it first, or name another student.")


def _newest_of(stage: Path) -> Path | None:
    return next((stage / name for name in ("best", "last") if (stage / name).is_dir()), None)


def print_json(value: dict[str, Any]) -> None:
    """A command's result for machines, as ``schemas/commands/`` has it; null stands for numbers that JSON lacks."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
