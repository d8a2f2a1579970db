"""The command line: options flow in, one call goes out, results are printed. All work is done elsewhere.

Options override the configuration file. Errors that are the user's to fix come out as one paragraph on standard
error with a fixed exit code (see ``distill.errors``), never as a traceback.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from distill import __version__
from distill.errors import DistillError, UsageError

app = typer.Typer(
    name="distill",
    help="Cache a teacher's targets once, train any number of students from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path | None, typer.Option("--config", help="YAML file; options override it.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY.KEY=VALUE, any key of the configuration.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
CachePath = Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of the cache.")]


@app.command("cache-teacher")
def cache_teacher_command(
    *,
    teacher: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="DOMAIN=PATH or DOMAIN=HUB_NAME; repeatable.")] = None,
    eval_data: Annotated[list[str] | None, typer.Option("--eval", help="DOMAIN=PATH, held out.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the cache.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm (default where installed) or transformers.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Log-probabilities kept for each position [64].")] = None,
    temperatures: Annotated[str | None, typer.Option(help="Comma-separated [4,2,1].")] = None,
    hidden_bytes: Annotated[int | None, typer.Option(help="Bytes for each projected hidden state [128].")] = None,
    overlong: Annotated[str | None, typer.Option(help="truncate (default), reject or split.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens in a sequence [2048].")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="prompt=NAME, response=NAME, text=NAME …")] = None,
    config: Config = None,
    settings: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the teacher once over the data and keep what a student can learn from.

    Example: distill cache-teacher --teacher Qwen/Qwen2.5-72B-Instruct --data general=g.jsonl --data medical=m.jsonl
    --out cache. Running it again finishes what is missing.
    """
    from distill.config import CacheConfig
    from distill.teacher.job import cache_teacher

    targets = {
        "top_k": top_k,
        "temperatures": None if temperatures is None else _numbers(temperatures),
        "hidden_bytes": hidden_bytes,
    }
    given = {
        "teacher": teacher,
        "data": _by_domain(data, "--data"),
        "eval": _by_domain(eval_data, "--eval"),
        "out": out,
        "engine": engine,
        "targets": _given(targets),
        "overlong": overlong,
        "max_length": max_length,
        "dtype": dtype,
        "columns": dict(_pair(item, "--column", "NAME") for item in column or []),
    }
    result = cache_teacher(_configuration(CacheConfig, "cache", config, given, settings), quiet=quiet)
    if as_json:
        _print_json(result.as_dict())
        return
    state = "sealed" if result.manifest else "not yet sealed: other workers owe units"
    rate = f", {result.num_targets / result.seconds:,.0f} tokens/s" if result.seconds else ""
    print(f"{result.root}: {result.num_units_written} units written, {result.num_targets:,} targets{rate}; {state}.")


@app.command("train")
def train_command(
    *,
    stage: Annotated[str, typer.Option(help="1, 2, 3, or a range such as 1-3.")],
    cache: Annotated[str | None, typer.Option(help="Folder of the cache.")] = None,
    student: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    student_layers: Annotated[int | None, typer.Option(help="Keep this many evenly spaced layers.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    start: Annotated[Path | None, typer.Option("--from", help="Checkpoint to start from.")] = None,
    tune: Annotated[str | None, typer.Option(help="lora (default) or full.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    wandb: Annotated[bool | None, typer.Option("--wandb/--no-wandb", help="Also log to wandb.")] = None,
    allow_incomplete: Annotated[bool | None, typer.Option("--allow-incomplete", help="Use an unsealed cache.")] = None,
    config: Config = None,
    settings: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the student from a cache; the teacher is not needed.

    Example: distill train --stage 1-3 --cache cache --student Qwen/Qwen2.5-7B-Instruct --out run. Running it again
    resumes, or recognises a finished stage.
    """
    from distill.config import TrainConfig
    from distill.student.trainer import train_stage

    given = {
        "cache": cache,
        "student": student,
        "student_layers": student_layers,
        "out": out,
        "tune": tune,
        "precision": precision,
        "wandb": wandb,
        "allow_incomplete": allow_incomplete,
    }
    resolved = _configuration(TrainConfig, "train", config, given, settings)
    results = []
    for number in _stages(stage):
        results.append(train_stage(resolved, number, start=start, quiet=quiet))
        start = None
    if as_json:
        _print_json({"stages": [result.as_dict() for result in results]})
        return
    from distill.report.render import render_stages

    render_stages([result.as_dict() for result in results])


@app.command("inspect")
def inspect_command(
    cache: CachePath,
    *,
    row: Annotated[int, typer.Option(help="Which sequence to show token by token.")] = 0,
    as_json: Json = False,
) -> None:
    """Show what a cache holds: identity, counts, bytes, fidelity, and one row token by token.

    Example: distill inspect cache --row 7
    """
    from distill.report.inspect import inspect
    from distill.report.render import render_inspect

    report = inspect(cache, row=row)
    if as_json:
        _print_json(report.as_dict())
    else:
        render_inspect(report)


@app.command("verify")
def verify_command(cache: CachePath, *, as_json: Json = False) -> None:
    """Read a cache back whole and check hashes, counts and ranges; exit code 5 if anything is wrong.

    Example: distill verify cache
    """
    from distill.errors import CorruptionError
    from distill.report.render import render_verify
    from distill.report.verify import verify

    report = verify(cache)
    if as_json:
        _print_json(report.as_dict())
    else:
        render_verify(report)
    if not report.ok:
        raise typer.Exit(CorruptionError.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"distill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of ``distill``: runs a command and turns the errors of ``distill.errors`` into exit codes."""
    try:
        app()
    except DistillError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _configuration(
    model: Any,
    section: Literal["cache", "train"],
    path: Path | None,
    options: dict[str, Any],
    settings: list[str] | None,
) -> Any:
    """The file's section, overridden by options, overridden by --set, validated."""
    from distill.config import read_section, validated

    values = _merged(read_section(path, section), _given(options))
    for item in settings or []:
        key, text = _pair(item, "--set", "VALUE")
        values = _merged(values, _nested(key.split("."), _yaml_value(text)))
    return validated(model, values, origin=str(path) if path else f"distill {section}")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _given(values: dict[str, Any]) -> dict[str, Any]:
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


def _pair(item: str, option: str, what: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not (key and equals and value):
        raise UsageError(f"{option} takes KEY={what}, got '{item}'.")
    return key, value


def _by_domain(items: list[str] | None, option: str) -> dict[str, list[str]]:
    domains: dict[str, list[str]] = {}
    for item in items or []:
        domain, path = _pair(item, option, "PATH, where KEY is the domain's name")
        domains.setdefault(domain, []).append(path)
    return domains


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--temperatures takes numbers separated by commas, got '{text}'.") from error


def _stages(text: str) -> list[int]:
    first, _, last = text.partition("-")
    try:
        numbers = list(range(int(first), int(last or first) + 1))
    except ValueError:
        numbers = []
    if not numbers or not set(numbers) <= {1, 2, 3}:
        raise UsageError(f"--stage takes 1, 2, 3 or a range such as 1-3, got '{text}'.")
    return numbers


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
