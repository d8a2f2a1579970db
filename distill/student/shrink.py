"""A student and a number of layers flow in, a smaller student saved as a plain transformers folder flows out."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distill.errors import StorageError, UsageError
from distill.student.tokenizer import save_tokenizer

_RECORD = "distill.json"
_EARLIER = {"layer_choice": "even"}  # of folders that were made before there was a choice


def shrunken_student(
    source: str,
    num_layers: int,
    *,
    folder: Path,
    trust_remote_code: bool,
    choose: Callable[[], list[int]] | None = None,
) -> Path:
    """``folder``, which holds ``source`` (model folder or hub name) with ``num_layers`` of its layers.

    These are evenly spaced, or those that ``choose`` names. It is made once: a folder that was made from the same
    source, number and choice is used as it is. Raises UsageError when it was made from others, or when the model has
    fewer layers or none that can be found.
    """
    record = {"student": source, "student_layers": num_layers, "layer_choice": "loss" if choose else "even"}
    if folder.exists():
        _check_record(folder, record)
        return folder
    from transformers import AutoTokenizer

    from distill.student.model import load_causal

    wanted = num_layers if choose is None else choose()
    model = load_causal(source, dtype="auto", trust_remote_code=trust_remote_code)
    kept = keep_layers(model, wanted)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    aside = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        save_tokenizer(tokenizer, aside)
        (aside / _RECORD).write_text(json.dumps({**record, "layers": kept}, indent=2) + "\n", encoding="utf-8")
        aside.rename(folder)
    except OSError as error:
        raise StorageError(
            f"cannot write the shrunken student to {folder}: {error}. Free space or correct --out."
        ) from error
    return folder


def keep_layers(model: Any, layers: int | Sequence[int]) -> list[int]:
    """Keep some layers of ``model`` in place, by their numbers, or so many evenly spaced; returns their old numbers.

    Layers learn their new number, and the configuration the number of layers and the kinds of those kept.
    """
    config = model.config.get_text_config()
    total = config.num_hidden_layers
    kept = evenly_spaced(total, layers) if isinstance(layers, int) else list(layers)
    parent, name = _list_of_layers(model, len(kept))
    found = getattr(parent, name)
    setattr(parent, name, nn.ModuleList([found[index] for index in kept]))
    for number, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # attention finds its cache by it
    # Lists such as layer_types have one entry for each layer.
    per_layer = [
        key
        for key, value in config.to_dict().items()
        if "layer" in key and isinstance(value, list | tuple) and len(value) == total
    ]
    config.num_hidden_layers = len(kept)
    for key in per_layer:
        values = getattr(config, key)
        setattr(config, key, [values[index] for index in kept])
    return kept


def layers_of(model: Any, num_layers: int) -> nn.ModuleList:
    """The layers of ``model``. Raises UsageError when they are fewer than ``num_layers`` or cannot be found."""
    layers: nn.ModuleList = getattr(*_list_of_layers(model, num_layers))
    return layers


def _list_of_layers(model: Any, num_layers: int) -> tuple[nn.Module, str]:
    total = model.config.get_text_config().num_hidden_layers
    if num_layers > total:
        raise UsageError(
            f"student_layers is {num_layers}, but the student has {total} layers. Ask for {total} or fewer."
        )
    found = find_layers(model.base_model, total)
    if found is None:
        raise UsageError(
            f"student_layers: no list of {total} layers was found in {type(model.base_model).__name__}, so none can be "
            "left out. Leave student_layers away, or name a student that was made smaller beforehand."
        )
    return found


def evenly_spaced(total: int, num: int) -> list[int]:
    """``num`` numbers out of ``range(total)``, first and last included where ``num`` allows."""
    if num == 1:
        return [0]
    return [int(index * (total - 1) / (num - 1) + 0.5) for index in range(num)]


def same_depth(layer: int, *, teacher_layers: int, student_layers: int) -> int:
    """The student's layer at the relative depth of a teacher's: the one that ``evenly_spaced`` would make of it."""
    return int(layer * (student_layers - 1) / max(teacher_layers - 1, 1) + 0.5)


def find_layers(decoder: nn.Module, total: int) -> tuple[nn.Module, str] | None:
    """The module that holds the list of a decoder's ``total`` layers, and the list's name in it."""
    for parent in decoder.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == total:
                return parent, name
    return None


def _check_record(folder: Path, record: dict[str, object]) -> None:
    try:
        made_from = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} exists but {_RECORD} in it cannot be read, so nobody can tell what it was made from. Delete the "
            "folder, or use another --out."
        ) from error
    for key, value in record.items():
        made_with = made_from.get(key, _EARLIER.get(key))
        if made_with != value:
            raise UsageError(
                f"{folder} was made with {key} {made_with}, and {value} is asked for now. Use another --out."
            )
