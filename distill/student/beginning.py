"""A configuration and the number of a stage flow in; where the weights lie that it begins from flows out."""

from pathlib import Path

from distill.cache.reader import CacheReader
from distill.config import TrainConfig
from distill.errors import DataError
from distill.student import checkpoint
from distill.student.layers import chosen_layers
from distill.student.model import Origin
from distill.student.origin import origin_of
from distill.student.shrink import shrunken_student
from distill.student.stage import stage_folder
from distill.student.tokenizer import matching_tokenizer


def start_name(number: int, start: Path | None) -> str:
    """What stage ``number`` begins from, for records."""
    if start is not None:
        return str(start)
    return "student" if number == 1 else f"stage{number - 1}/best"


def first_origin(config: TrainConfig, number: int, start: Path | None, reader: CacheReader) -> Origin:
    """What a stage without a checkpoint of its own begins from: ``start``, the stage before, or ``config.student``.

    A student of fewer layers is made here. Raises DataError where the stage before is not finished.
    """
    if start is not None:
        return origin_of(start)
    if number > 1:
        return origin_of(_best_of_stage(config, number - 1))
    if config.student_layers is None:
        return origin_of(config.student)
    matching_tokenizer(config.student, reader, trust_remote_code=config.trust_remote_code)
    folder = shrunken_student(
        config.student,
        config.student_layers,
        folder=Path(config.out) / "student",
        trust_remote_code=config.trust_remote_code,
        choose=(lambda: chosen_layers(config, reader)) if config.layer_choice == "loss" else None,
    )
    return Origin(base=str(folder))


def _best_of_stage(config: TrainConfig, number: int) -> Path:
    folder = stage_folder(config, number)
    ways = f"Run --stage {number} first, or name a checkpoint or model to begin from with --from."
    if not (folder / "best").is_dir() or not (folder / "last").is_dir():
        raise DataError(f"{folder} has no best checkpoint, which stage {number + 1} begins from. {ways}")
    state = checkpoint.read_state(folder / "last")
    if not state.finished:
        raise DataError(f"{folder} is not finished: it stands at step {state.step}. {ways}")
    return folder / "best"
