"""``distill cache-teacher``."""

import os
from typing import Annotated

import typer

from distill.commands.options import Config, Json, Quiet, Set, configuration, given, pair, print_json
from distill.errors import UsageError


def command(
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
    worker: Annotated[
        str | None, typer.Option(help="INDEX/COUNT, 0/4 to 3/4; read from Slurm, Kubernetes and SkyPilot by itself.")
    ] = None,
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
    from distill.launch.worker import find_worker
    from distill.teacher.job import cache_teacher

    targets = {
        "top_k": top_k,
        "temperatures": None if temperatures is None else _numbers(temperatures),
        "hidden_bytes": hidden_bytes,
    }
    values = {
        "teacher": teacher,
        "data": _by_domain(data, "--data"),
        "eval": _by_domain(eval_data, "--eval"),
        "out": out,
        "engine": engine,
        "targets": given(targets),
        "overlong": overlong,
        "max_length": max_length,
        "dtype": dtype,
        "columns": dict(pair(item, "--column", "NAME") for item in column or []),
    }
    place = find_worker(worker, os.environ)
    resolved = configuration(CacheConfig, "cache", config, values, settings)
    result = cache_teacher(resolved, worker=place, quiet=quiet)
    if as_json:
        print_json(result.as_dict())
        return
    state = "sealed" if result.manifest else "not yet sealed: other workers owe units"
    rate = f", {result.num_targets / result.seconds:,.0f} tokens/s" if result.seconds else ""
    print(f"{result.root}: {result.num_units_written} units written, {result.num_targets:,} targets{rate}; {state}.")


def _by_domain(items: list[str] | None, option: str) -> dict[str, list[str]]:
    domains: dict[str, list[str]] = {}
    for item in items or []:
        domain, path = pair(item, option, "PATH, where KEY is the domain's name")
        domains.setdefault(domain, []).append(path)
    return domains


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--temperatures takes numbers separated by commas, got '{text}'.") from error
