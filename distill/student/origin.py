"""A checkpoint, a model folder or a hub name flows in; where base weights and adapter lie flows out.

The base of an adapter is written down as "run:PATH" where it lies in the run's own folder, so that a run may be moved.
"""

import json
import re
from pathlib import Path

from distill.errors import CorruptionError, DataError, UsageError
from distill.student.checkpoint import MODEL, STATE, State, read_checkpoint
from distill.student.model import Origin

_IN_RUN = "run:"
_ADAPTER_CONFIG = "adapter_config.json"


def origin_of(source: str | Path) -> Origin:
    """Where the weights of ``source`` come from.

    ``source`` is a checkpoint (verified here), a plain model folder, a folder of a LoRA adapter, or a hub name. Raises
    UsageError when it looks like a path and is not there, CorruptionError when it is a damaged checkpoint.
    """
    folder = Path(source)
    if not folder.is_dir():
        if isinstance(source, Path) or folder.is_absolute() or source.startswith("."):
            raise UsageError(
                f"there is no folder {source}. Name a model folder or hub name with --student, a checkpoint such as "
                "RUN/stage1/best with --from."
            )
        return Origin(base=source)
    if (folder / STATE).is_file():
        return origin_of_checkpoint(folder, read_checkpoint(folder))
    if (folder / _ADAPTER_CONFIG).is_file():
        return Origin(base=_base_of_adapter(folder), adapter=folder)
    return Origin(base=str(folder))


def origin_of_checkpoint(folder: Path, state: State) -> Origin:
    """Where the weights of a verified checkpoint come from. Raises DataError when the base of an adapter is gone."""
    model = folder / MODEL
    if state.base is None:
        return Origin(base=str(model))
    return Origin(base=_found(state.base, folder), adapter=model, base_weights=state.base_weights)


def recorded_base(base: str, run: Path) -> str:
    """How a checkpoint of ``run`` writes down the base of its adapter."""
    path = Path(base)
    if path.is_dir() and path.resolve().is_relative_to(run.resolve()):
        return _IN_RUN + path.resolve().relative_to(run.resolve()).as_posix()
    return base


def _found(recorded: str, checkpoint: Path) -> str:
    if not recorded.startswith(_IN_RUN):
        return recorded
    run = next(
        (parent.parent for parent in checkpoint.resolve().parents if re.fullmatch(r"stage\d", parent.name)), None
    )
    base = None if run is None else run / recorded.removeprefix(_IN_RUN)
    if base is None or not base.is_dir():
        raise DataError(
            f"{checkpoint} is an adapter for {recorded.removeprefix(_IN_RUN)} in the folder of its run, which is not "
            "there. Keep a checkpoint in its run, or move the whole run."
        )
    return str(base)


def _base_of_adapter(folder: Path) -> str:
    path = folder / _ADAPTER_CONFIG
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptionError(
            f"{path} does not name the base model of the adapter. Restore the file, or start from another checkpoint."
        ) from error
