"""A checkpoint flows in, a plain transformers folder with merged weights and a tokenizer flows out.

``N`` tokens of the probe, ``V`` rows of the head.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distill import __version__
from distill.errors import CorruptionError, StorageError, UsageError
from distill.student.adapter import refuse_other_base, with_adapter
from distill.student.model import Origin, load_causal
from distill.student.origin import origin_of
from distill.student.tokenizer import save_tokenizer

ExportDtype = Literal["auto", "float32", "bfloat16", "float16"]
_PROBE_TOKENS = 64
# Largest ‖difference‖ / ‖logits‖ that rounding of merged weights explains; with 30 layers it was 8e-7, 2e-3 and 2e-2.
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


def export_student(
    checkpoint: Path, out: Path, *, dtype: ExportDtype = "auto", trust_remote_code: bool = False
) -> Exported:
    """Write the student of ``checkpoint`` (``RUN/stage3/best``, or an adapter folder) to the new folder ``out``.

    A LoRA adapter is merged into its base. ``auto`` keeps the dtype of the base (float32 for a full fine-tuning). What
    was written is loaded again and its logits are compared with the checkpoint's own on a fixed probe before the folder
    gets its name. Raises UsageError when ``out`` exists, CorruptionError for a damaged checkpoint or other logits,
    IdentityError when the base of an adapter has changed, StorageError when the disk refuses.
    """
    if out.exists():
        raise UsageError(f"{out} exists. Export into a new folder with --out, or delete the old one.")
    origin = origin_of(checkpoint)
    model = load_causal(origin.base, dtype=_dtype(dtype), trust_remote_code=trust_remote_code).eval()
    if origin.adapter is not None:
        refuse_other_base(origin.base, origin.adapter, origin.base_weights)
        model = with_adapter(model, origin.adapter, trainable=False).eval()
    probe_1N = _probe(model)
    wanted_NV = _logits(model, probe_1N)
    if origin.adapter is not None:
        model = model.merge_and_unload()
    kept_dtype, num_parameters = model.dtype, model.num_parameters()
    aside = out.with_name(f".{out.name}.new")
    _write(model, origin, checkpoint, aside=aside, trust_remote_code=trust_remote_code)
    del model  # two copies of a large student need not fit
    got_NV = _logits(load_causal(str(aside), dtype="auto", trust_remote_code=trust_remote_code).eval(), probe_1N)
    error = float((got_NV - wanted_NV).norm() / wanted_NV.norm().clamp(min=1e-30))
    if not error <= _LIMITS[kept_dtype]:
        shutil.rmtree(aside)
        raise CorruptionError(
            f"the exported model is not the student of {checkpoint}: on a probe its logits differ by {error:.2%}. "
            "Nothing was kept. Export with --dtype float32, and check the disk."
        )
    _rename(aside, out)
    return Exported(
        folder=out,
        base=origin.base,
        merged_adapter=origin.adapter is not None,
        dtype=str(kept_dtype).removeprefix("torch."),
        num_parameters=num_parameters,
        logit_error=error,
    )


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
