"""``distill cache-teacher``."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from distill.commands.options import Config, Json, Quiet, Set, configuration, given, pair, print_json, with_options_of
from distill.errors import UsageError

if TYPE_CHECKING:
    from distill.config import CacheConfig


def cache_config(
    *,
    teacher: Annotated[str | None, typer.Option(help="Model folder or hub name.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="DOMAIN=PATH or DOMAIN=HUB_NAME; repeatable.")] = None,
    eval_data: Annotated[list[str] | None, typer.Option("--eval", help="DOMAIN=PATH, held out.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the cache.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm (default where installed) or transformers.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Log-probabilities kept for each position [64].")] = None,
    temperatures: Annotated[str | None, typer.Option(help="Comma-separated [4,2,1].")] = None,
    hidden_bytes: Annotated[int | None, typer.Option(help="Bytes for each projected hidden state [128].")] = None,
    layers: Annotated[str | None, typer.Option(help="Inner layers to keep too, comma-separated: 12,24.")] = None,
    overlong: Annotated[str | None, typer.Option(help="truncate (default), reject or split.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens in a sequence [2048].")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="prompt=NAME, response=NAME, text=NAME …")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Ids drawn at each position, for T=1 alone [0].")] = None,
    generate: Annotated[
        bool,
        typer.Option("--generate", help="The teacher answers the prompts itself; --set generate.temperature=0.7 …"),
    ] = False,
    projection_from: Annotated[
        str | None, typer.Option(help="A cache whose projection to take, so that both train together.")
    ] = None,
    config: Config = None,
    settings: Set = None,
) -> "CacheConfig":
    """The options of every command that is about a cache to be made, as its configuration."""
    from distill.config import CacheConfig, GenerateConfig

    targets = {
        "top_k": top_k,
        "temperatures": None if temperatures is None else _numbers(temperatures, "--temperatures"),
        "hidden_bytes": hidden_bytes,
        "layers": None if layers is None else _numbers(layers, "--layers"),
        "num_samples": num_samples,
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
        "projection_from": projection_from,
        "columns": dict(pair(item, "--column", "NAME") for item in column or []),
    }
    resolved: CacheConfig = configuration(CacheConfig, "cache", config, values, settings)
    if generate and resolved.generate is None:
        resolved = resolved.model_copy(update={"generate": GenerateConfig()})
    return resolved


@with_options_of(cache_config)
def command(
    resolved: "CacheConfig",
    *,
    worker: Annotated[
        str | None, typer.Option(help="INDEX/COUNT, 0/4 to 3/4; read from Slurm, Kubernetes and SkyPilot by itself.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Fill it with the engines of a Ray cluster (extra `ray`).")
    ] = False,
    ray_workers: Annotated[int | None, typer.Option(help="Engines on it; by default as many as fit.", min=1)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the teacher once over the data and keep what a student can learn from.

    Example: distill cache-teacher --teacher Qwen/Qwen2.5-72B-Instruct --data general=g.jsonl --data medical=m.jsonl
    --out cache. Running it again finishes what is missing.
    """
    from distill.launch.worker import find_worker
    from distill.teacher.job import cache_teacher
    from distill.teacher.on_ray import cache_teacher_on_ray

    place = None if ray else find_worker(worker, os.environ)
    _refuse_two_ways(worker, ray=ray, ray_workers=ray_workers)
    if ray:
        result = cache_teacher_on_ray(resolved, num_workers=ray_workers, quiet=quiet)
    else:
        result = cache_teacher(resolved, worker=place, quiet=quiet)
    if as_json:
        print_json(result.as_dict())
        return
    state = "sealed" if result.manifest else "not yet sealed: other workers owe units"
    rate = f", {result.num_targets / result.seconds:,.0f} tokens/s" if result.seconds else ""
    print(f"{result.root}: {result.num_units_written} units written, {result.num_targets:,} targets{rate}; {state}.")


def _refuse_two_ways(worker: str | None, *, ray: bool, ray_workers: int | None) -> None:
    if ray and worker is not None:
        raise UsageError("--ray and --worker are two ways to have several workers. Give one of them.")
    if ray_workers is not None and not ray:
        raise UsageError(
            "--ray-workers says how many engines run on a Ray cluster. Give --ray as well, or leave it out."
        )


def _by_domain(items: list[str] | None, option: str) -> dict[str, list[str]]:
    domains: dict[str, list[str]] = {}
    for item in items or []:
        domain, path = pair(item, option, "PATH, where KEY is the domain's name")
        domains.setdefault(domain, []).append(path)
    return domains


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} takes numbers separated by commas, got '{text}'.") from error
