"""A model and a folder, or settings, flow in; peft's wrapper of the model with a LoRA adapter flows out."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from distill.cache.identity import model_files_hash
from distill.config import LoraConfig
from distill.errors import CorruptionError, IdentityError, UsageError

ADAPTER_FILE = "adapter_model.safetensors"


def weights_of(base: str) -> str:
    """The hash of the weights of a model folder, or of a loaded model of the hub. Raises as ``model_files_hash``."""
    from transformers.utils.hub import cached_file

    return model_files_hash(base if Path(base).is_dir() else Path(str(cached_file(base, "config.json"))).parent)


def refuse_other_base(base: str, adapter: Path, expected: str | None) -> None:
    """Raise IdentityError where the loaded ``base`` has other weights than those that the adapter was trained on."""
    if expected is not None and weights_of(base) != expected:
        raise IdentityError(
            f"the weights of {base} are not those that the adapter in {adapter} was trained on, so together they are "
            "no student that anybody trained. Restore the folder, or the revision in the hub's cache, or begin anew."
        )


def with_adapter(model: Any, folder: Path, *, trainable: bool) -> Any:
    """peft's wrapper of ``model`` with the adapter in ``folder``. Raises UsageError and CorruptionError as they say."""
    from peft import PeftModel

    if not (folder / ADAPTER_FILE).is_file():
        raise UsageError(f"{folder} has no {ADAPTER_FILE}; adapters of another format are never loaded. Check --from.")
    try:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable, use_safetensors=True)
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise CorruptionError(
            f"the adapter in {folder} does not fit its base model: {reason}. Restore it from a copy, or start from "
            "another checkpoint with --from."
        ) from error
    if trainable:
        refuse_tied(adapted, f"the adapter in {folder}")
    return adapted


def adapted_layers(model: Any) -> list[tuple[str, Any]]:
    """Names within the plain model, and modules, of what an adapter changes in peft's ``model``."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    found: list[tuple[str, Any]] = []
    for name, module in model.get_base_model().named_modules():
        within = bool(found) and name.startswith(f"{found[-1][0]}.")
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not within:
            found.append((name, module))
    return found


def refuse_tied(model: Any, adapter: str) -> None:
    """Raise UsageError where low ranks on one layer of peft's ``model`` leave another with the same weight alone.

    Merged into that weight they would change both. Whole copies of a layer (``modules_to_save``) untie it instead.
    """
    layers = [(name, module.get_base_layer()) for name, module in adapted_layers(model) if hasattr(module, "lora_A")]
    _refuse_tied(model.get_base_model(), layers, f"{adapter} changes")


def _refuse_tied(model: Any, layers: Iterable[tuple[str, nn.Module]], who: str) -> None:
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if name.endswith(".original_module"):  # of which a whole copy is used
            continue
        users.setdefault(id(_own_weight(module)), []).append(name.removesuffix(".base_layer"))
    for name, layer in layers:
        others = [] if _own_weight(layer) is None else [user for user in users[id(_own_weight(layer))] if user != name]
        if others:
            raise UsageError(
                f"{who} {name}, whose weight is that of {others[0]} too (tie_word_embeddings). An adapter changes the "
                "one and not the other, so no plain model has the weights that were trained. Leave it out of "
                "lora.target_modules, or give the student a head of its own: load it with tie_word_embeddings=False, "
                "copy the embedding into the head, save it."
            )


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    return dict(module.named_parameters(recurse=False)).get("weight")


def with_new_adapter(model: Any, lora: LoraConfig) -> Any:
    """peft's wrapper of ``model`` with a new adapter, which changes nothing yet. Raises UsageError."""
    import peft

    _check_targets(model, lora.target_modules)
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, settings)


def refuse_other_lora(model: Any, folder: Path, asked: LoraConfig) -> None:
    """Raise UsageError where the user asks for another adapter than the one in ``folder``, which ``model`` has.

    It is trained on as it was made, so what is asked for otherwise would be passed over in silence.
    """
    made = model.peft_config[model.active_adapter]
    stored = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    there = {name: getattr(made, key, None) for name, key in stored.items()}  # other kinds of adapters lack some
    different = [name for name in there if name in asked.model_fields_set and getattr(asked, name) != there[name]]
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    if "target_modules" in asked.model_fields_set and not _are_targets(adapted, asked.target_modules):
        different.append("target_modules")
        there["target_modules"] = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in adapted}))
    if different:
        name = different[0]
        raise UsageError(
            f"lora.{name} is {getattr(asked, name)}, but training goes on with the adapter in {folder}, whose {name} "
            f"is {there[name]}. Set it to that, or make a plain model of the adapter with `distill export` and begin "
            "from it with --from."
        )


def _are_targets(names: list[str], targets: tuple[str, ...]) -> bool:
    """Whether each target is met, and each name is one of theirs."""
    met = {target for name in names for target in targets if name.endswith(f".{target}")}
    return met == set(targets) and all(name.endswith(tuple(f".{target}" for target in targets)) for name in names)


def _check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """peft passes over names that match nothing as long as one matches, and trains less than was asked for."""
    names = [name for name, _ in model.named_modules()]
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unmatched = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unmatched or not targets:
        raise UsageError(
            f"lora.target_modules: {', '.join(unmatched) or 'none is named'}; no module of the student has such a "
            f"name. Its linear layers are {', '.join(sorted(linear))}."
        )
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if any(f".{head}".endswith(f".{target}") for target in targets):
        raise UsageError(
            f"lora.target_modules names the LM head ({head}), which the losses multiply with themselves, so that it "
            "cannot carry an adapter. Leave it away, or train with tune: full."
        )
    asked = tuple(f".{target}" for target in targets)
    layers = [(name, module) for name, module in model.named_modules() if f".{name}".endswith(asked)]
    _refuse_tied(model, layers, "lora.target_modules names")
