"""``distill eval``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from distill.commands.options import (
    Config,
    Json,
    Set,
    checkpoint,
    one_or_many,
    origin_of_settings,
    print_json,
    section_values,
)
from distill.errors import UsageError


def command(
    *,
    cache: Annotated[list[str] | None, typer.Option(help="Folder of the cache; repeatable, for several.")] = None,
    student: Annotated[str | None, typer.Option(help="Stage of a run (RUN/stage3), model folder or hub name.")] = None,
    group_by: Annotated[str | None, typer.Option(help="Also by the values of this metadata key.")] = None,
    choices: Annotated[
        list[Path] | None, typer.Option(help="Multiple-choice questions, .jsonl or .csv; repeatable.")
    ] = None,
    lm_eval: Annotated[str | None, typer.Option("--lm-eval", help="Comma-separated tasks of lm-eval.")] = None,
    lm_eval_tasks: Annotated[Path | None, typer.Option(help="Folder of further tasks as lm-eval's YAML files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each lm-eval task.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    allow_incomplete: Annotated[bool | None, typer.Option("--allow-incomplete", help="Use an unsealed cache.")] = None,
    config: Config = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Measure a student against the cached teacher on the held-out rows, on multiple choices and on lm-eval's tasks.

    Example: distill eval --cache cache --student run/stage3 --choices medqa.jsonl. The teacher is not needed. With
    --choices or --lm-eval the cache may be left away; held-out rows are then not measured.
    """
    tasks = [task.strip() for task in (lm_eval or "").split(",") if task.strip()]
    if lm_eval is not None and not tasks:
        raise UsageError(f"--lm-eval '{lm_eval}' names no task. Name some with --lm-eval TASK,….")
    if (lm_eval_tasks or limit) and not tasks:
        raise UsageError("--lm-eval-tasks and --limit say how --lm-eval works. Name tasks with --lm-eval TASK,….")
    options = {
        "cache": one_or_many(cache),
        "student": student,
        "precision": precision,
        "allow_incomplete": allow_incomplete,
    }
    resolved, with_cache = _resolved(config, options, settings, needs_cache=not (choices or tasks))
    if (group_by or allow_incomplete) and not with_cache:
        raise UsageError(
            "--group-by and --allow-incomplete say how the held-out rows of a cache are measured. Name it with --cache."
        )
    result = _measured(
        resolved,
        choices=choices or [],
        group_by=group_by,
        with_cache=with_cache,
        lm_eval={"tasks": tasks, "folder": lm_eval_tasks, "limit": limit} if tasks else {},
    )
    if as_json:
        about = {"cache": resolved.cache, "group_by": group_by} if with_cache else {}
        print_json({"student": resolved.student, **about, **result})
    else:
        _render(resolved.student, result, group_by)


def _resolved(
    path: Path | None, options: dict[str, Any], settings: list[str] | None, *, needs_cache: bool
) -> tuple[Any, bool]:
    """The configuration, and whether the file or an option names a cache, or one is needed."""
    from distill.config import TrainConfig, validated

    values = section_values("train", path, options, settings)
    if values.get("cache") is None:
        values.pop("cache", None)  # null leaves away the cache of a file
    with_cache = "cache" in values or needs_cache
    # What a configuration of training must have, and nothing here reads or writes.
    values |= {"out": "."} if with_cache else {"out": ".", "cache": "."}
    resolved = validated(TrainConfig, values, origin=origin_of_settings(path, options, settings))
    return resolved.model_copy(update={"student": checkpoint(resolved.student)}), with_cache


def _measured(
    config: Any, *, choices: list[Path], group_by: str | None, with_cache: bool, lm_eval: dict[str, Any]
) -> dict[str, Any]:
    """Figures as plain values; the model is loaded once, after all that can be refused without it."""
    from dataclasses import asdict

    from distill.cache.join import open_caches
    from distill.student.benchmarks import require_lm_eval, run_tasks
    from distill.student.choices import read_questions, score_choices
    from distill.student.evaluate import Subject, held_out_figures

    questions = {str(path): read_questions(path) for path in choices}
    if lm_eval:
        require_lm_eval()
    reader = open_caches(config.caches, allow_incomplete=config.allow_incomplete) if with_cache else None
    subject = Subject.load(config, reader=reader)
    result: dict[str, Any] = {}
    if reader is not None:
        result |= asdict(held_out_figures(subject.student, reader, config, group_by=group_by))
    budget = {"token_budget": config.micro_batch_tokens, "head_chunk": config.head_chunk}
    scored = {
        path: asdict(score_choices(subject.student, subject.tokenizer, asked, **budget))
        for path, asked in questions.items()
    }
    if scored:
        result["choices"] = scored
    if lm_eval:
        result["lm_eval"] = [asdict(task) for task in run_tasks(subject.student, subject.tokenizer, **lm_eval)]
    return result


def _render(student: str, result: dict[str, Any], group_by: str | None) -> None:
    from distill.report.table import terminal

    console = terminal()
    if "overall" in result:
        console.print(_held_out_table(student, result, group_by))
    for path, figures in result.get("choices", {}).items():
        console.print(_choices_table(path, figures))
    if "lm_eval" in result:
        console.print(_tasks_table(result["lm_eval"]))


def _held_out_table(student: str, evaluation: dict[str, Any], group_by: str | None) -> Any:
    from distill.report.table import plain_table

    temperatures = list(evaluation["overall"]["kl"])
    rows = [*evaluation["domains"].items()]
    rows += [(f"{group_by}: {group}", figures) for group, figures in evaluation["groups"].items()]
    rows.append(("all", evaluation["overall"]))
    return plain_table(
        f"{student} against the teacher, held out ({evaluation['tail']} tail)",
        [
            "",
            *(f"KL T={temperature:g}" for temperature in temperatures),
            "CE",
            "ppl",
            "top-1",
            "top-5",
            "ECE",
            "tokens",
        ],
        [
            (
                name,
                *(f"{figures['kl'][temperature]:.3f}" for temperature in temperatures),
                f"{figures['ce']:.3f}",
                f"{figures['perplexity']:.4g}",
                *(f"{figures[key]:.1%}" for key in ("top1_agreement", "top5_agreement", "ece")),
                f"{figures['num_tokens']:,}",
            )
            for name, figures in rows
        ],
    )


def _choices_table(path: str, result: dict[str, Any]) -> Any:
    from distill.report.table import plain_table

    measures = ("accuracy", "precision", "recall", "f1")
    rows = []
    for name, key in (("plain", "plain"), ("by length", "normalised")):
        figures = result[key]
        rows.append((name, *(f"{figures[measure]:.1%}" for measure in measures), f"{figures['num_questions']:,}"))
    return plain_table(f"{path}, chosen by likelihood", ["", *measures, "questions"], rows)


def _tasks_table(tasks: list[dict[str, Any]]) -> Any:
    from distill.report.table import plain_table

    rows = []
    for task in tasks:
        for measure, value in task["values"].items():
            error = task["errors"].get(measure)
            rows.append((task["task"], measure, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
    return plain_table("lm-eval", ["", "measure", "value", "± error"], rows)
