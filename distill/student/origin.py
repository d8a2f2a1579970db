"""A checkpoint, a model folder or a hub name flows in; where base weights and adapter lie flows out.

The base of an adapter is written down as "run:PATH" where it lies in the run's own folder, so that a run may be moved.
"""

import json
import re
from pathlib import Path
from typing import Any

from distill.config import LoraConfig
from distill.errors import CorruptionError, DataError, UsageError
from distill.student.checkpoint import MODEL, STATE, State, read_checkpoint
from distill.student.model import Origin

_IN_RUN = "run:"
_ADAPTER_CONFIG = "adapter_config.json"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


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
    if not path.is_dir():
        return base
    if path.resolve().is_relative_to(run.resolve()):
        return _IN_RUN + path.resolve().relative_to(run.resolve()).as_posix()
    return str(path.resolve())  # whatever the working directory of who reads it


def _found(recorded: str, checkpoint: Path) -> str:
    if not recorded.startswith(_IN_RUN):
        if Path(recorded).is_absolute() and not Path(recorded).is_dir():
            raise DataError(
                f"{checkpoint} is an adapter for the model in {recorded}, which is not there. Put it back, or "
                "merge the two where it is with `distill export`."
            )
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


def settings_of_adapter(folder: Path) -> LoraConfig | None:
    """What the adapter in ``folder`` was made with; None for kinds that ``LoraConfig`` has no words for."""
    try:
        made = _adapter_config(folder)
        modules = made["target_modules"]
        return LoraConfig(
            r=made["r"],
            alpha=made["lora_alpha"],
            dropout=made["lora_dropout"],
            target_modules=(modules,) if isinstance(modules, str) else tuple(sorted(modules)),
        )
    except _UNREADABLE:
        return None


def _base_of_adapter(folder: Path) -> str:
    try:
        return str(_adapter_config(folder)["base_model_name_or_path"])
    except _UNREADABLE as error:
        raise CorruptionError(
            f"{folder / _ADAPTER_CONFIG} does not name the base model of the adapter. Restore the file, or start from "
            "another checkpoint."
        ) from error


def _adapter_config(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return made
