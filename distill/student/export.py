"""A checkpoint flows in, a plain transformers folder with merged weights and a tokenizer flows out.

``N`` tokens of the probe, ``V`` rows of the head.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distill import __version__
from distill.errors import CorruptionError, DistillError, StorageError, UsageError
from distill.student.adapter import refuse_other_base, with_adapter
from distill.student.merge import Columns, columns_of, merged, refuse_unmerged
from distill.student.model import Origin, load_causal
from distill.student.origin import origin_of
from distill.student.tokenizer import save_tokenizer

ExportDtype = Literal["auto", "float32", "bfloat16", "float16"]
_PROBE_TOKENS = 64
# Largest ‖difference‖ / ‖logits‖ that rounding of merged weights explains; with 30 layers it was 8e-7, 2e-3 and 2e-2.
# This is for what else a folder tells a model, its configuration for example: weights have sharper checks.
_LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A folder that transformers and vLLM load, and how far its logits are from those of the checkpoint."""

    folder: Path
    base: str
    merged_adapter: bool
    dtype: str
    num_parameters: int
    logit_error: float  # ‖difference‖ / ‖logits‖ on the probe

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expected:
    """What must be found in the folder: the student beside its adapter, and the bits that were written."""

    adapted: dict[str, Columns]
    digests: dict[str, str]
    logits_NV: Tensor


def export_student(
    checkpoint: Path, out: Path, *, dtype: ExportDtype = "auto", trust_remote_code: bool = False
) -> Exported:
    """Write the student of ``checkpoint`` (``RUN/stage3/best``, or an adapter folder) to the new folder ``out``.

    A LoRA adapter is merged into its base. ``auto`` keeps the dtype of the base (float32 for a full fine-tuning). What
    was written is loaded again before the folder gets its name: its weights must be those that were merged to the bit,
    those of adapted layers must be base and adapter together, and its logits on a fixed probe the checkpoint's own but
    for rounding. Raises UsageError when ``out`` exists or an adapter cannot be merged, CorruptionError for a damaged
    checkpoint, other weights or other logits, IdentityError when the base of an adapter has changed, StorageError when
    the disk refuses.
    """
    if out.exists():
        raise UsageError(f"{out} exists. Export into a new folder with --out, or delete the old one.")
    origin = origin_of(checkpoint)
    model = load_causal(origin.base, dtype=_dtype(dtype), trust_remote_code=trust_remote_code).eval()
    adapted: dict[str, Columns] = {}
    if origin.adapter is not None:
        refuse_other_base(origin.base, origin.adapter, origin.base_weights)
        model = with_adapter(model, origin.adapter, trainable=False).eval()
        adapted = columns_of(model)
    wanted_NV = _logits(model, _probe(model))
    if origin.adapter is not None:
        model = merged(model, origin.adapter)
    expected = _Expected(adapted=adapted, digests=_digests(model), logits_NV=wanted_NV)
    aside = out.with_name(f".{out.name}.new")
    _write(model, origin, checkpoint, aside=aside, trust_remote_code=trust_remote_code)
    del model  # two copies of a large student need not fit
    try:
        model = load_causal(str(aside), dtype="auto", trust_remote_code=trust_remote_code).eval()
        error = _check(model, expected, checkpoint, origin)
    except DistillError:
        shutil.rmtree(aside)
        raise
    _rename(aside, out)
    return Exported(
        folder=out,
        base=origin.base,
        merged_adapter=origin.adapter is not None,
        dtype=str(model.dtype).removeprefix("torch."),
        num_parameters=model.num_parameters(),
        logit_error=error,
    )


def _check(model: Any, expected: _Expected, checkpoint: Path, origin: Origin) -> float:
    """‖difference‖ / ‖logits‖ of a model that was read back. Raises CorruptionError where it is not the student."""
    digests = _digests(model)
    changed = [name for name in expected.digests | digests if expected.digests.get(name) != digests.get(name)]
    if changed:
        raise CorruptionError(
            f"the model exported from {checkpoint} was read back with other weights than were written: {len(changed)} "
            f"tensors differ, {changed[0]} among them. Nothing was kept. Check the disk, then export again."
        )
    if origin.adapter is not None:
        refuse_unmerged(model, expected.adapted, origin.adapter)
    got_NV = _logits(model, _probe(model))
    error = float((got_NV - expected.logits_NV).norm() / expected.logits_NV.norm().clamp(min=1e-30))
    if not error <= _LIMITS[model.dtype]:
        raise CorruptionError(
            f"the exported model is not the student of {checkpoint}: on a probe its logits differ by {error:.2%}. "
            "Nothing was kept. Export with --dtype float32, and check the disk."
        )
    return error


def _digests(model: Any) -> dict[str, str]:
    """SHA-256 of each tensor that a model is made of."""
    return {
        name: f"{value.dtype} {hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()}"
        for name, value in model.state_dict().items()
    }


def _dtype(name: ExportDtype) -> torch.dtype | str:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, "auto")


def _probe(model: Any) -> Tensor:
    """Ids spread evenly over the vocabulary, the same for every export: [1, N]."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    return (torch.arange(_PROBE_TOKENS) * vocab_size // _PROBE_TOKENS).unsqueeze(0)


@torch.no_grad()
def _logits(model: Any, probe_1N: Tensor) -> Tensor:
    logits_NV: Tensor = model(input_ids=probe_1N, use_cache=False).logits[0]
    return logits_NV.float()


def _write(model: Any, origin: Origin, checkpoint: Path, *, aside: Path, trust_remote_code: bool) -> None:
    from transformers import AutoTokenizer

    beside = origin.adapter if origin.adapter is not None and (origin.adapter / "tokenizer.json").is_file() else None
    tokenizer = AutoTokenizer.from_pretrained(beside or origin.base, trust_remote_code=trust_remote_code)
    record = {"distill": __version__, "checkpoint": str(checkpoint), "base": origin.base}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        save_tokenizer(tokenizer, aside)
        (aside / "distill.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _refused(aside, error) from error


def _rename(aside: Path, out: Path) -> None:
    try:
        aside.rename(out)
    except OSError as error:
        raise _refused(out, error) from error


def _refused(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write the exported student to {folder}: {error}. Free space or correct --out.")
