"""``distill plan``."""

from typing import TYPE_CHECKING, Annotated

import typer

from distill.commands.cache_teacher import cache_config
from distill.commands.options import Json, Quiet, print_json, with_options_of

if TYPE_CHECKING:
    from distill.config import CacheConfig

_GIGA, _TERA = 1e9, 1e12


@with_options_of(cache_config, out=".")
def command(
    resolved: "CacheConfig",
    *,
    sample: Annotated[int | None, typer.Option(help="Tokenise only so many random rows.", min=1)] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Load the teacher and try it on a few sequences.")] = False,
    measure_tokens: Annotated[int, typer.Option(help="Trained targets that --measure takes.", min=1)] = 1000,
    gpu_memory: Annotated[float | None, typer.Option(help="Memory of one GPU, in GB.", min=0.001)] = None,
    gpu_flops: Annotated[float | None, typer.Option(help="Peak of one GPU, in TFLOP/s.", min=0.001)] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that is reached.", min=0.01, max=1)] = 0.4,
    tokens_per_second: Annotated[float | None, typer.Option(help="Rate of all GPUs together.", min=0.001)] = None,
    gpus: Annotated[int, typer.Option(help="GPUs that work at the same time.", min=1)] = 1,
    price: Annotated[float | None, typer.Option(help="Price of one GPU for an hour.", min=0)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell what a cache would hold, take and cost before it is made, from the data and the teacher's configuration.

    Example: distill plan --teacher Qwen/Qwen2.5-72B-Instruct --data general=g.jsonl --gpu-memory 80 --gpu-flops 990
    --gpus 8 --price 2.5. Writes nothing; of the teacher only configuration and tokenizer are needed, unless --measure.
    """
    from distill.report.plan import Look, plan
    from distill.report.render_plan import render_plan
    from distill.report.resources import Machine

    machine = Machine(
        gpu_memory=None if gpu_memory is None else gpu_memory * _GIGA,
        gpu_flops=None if gpu_flops is None else gpu_flops * _TERA,
        utilisation=utilisation,
        num_gpus=gpus,
        tokens_per_s=tokens_per_second,
        price=price,
    )
    look = Look(sample=sample, measure=measure_tokens if measure else None)
    report = plan(resolved, machine=machine, look=look, quiet=quiet)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        render_plan(report)
