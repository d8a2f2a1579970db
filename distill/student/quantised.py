"""A configuration flows in, what bitsandbytes is asked for flows out, or a refusal before any model loads.

bitsandbytes keeps the moments of AdamW in 8 bits and the frozen base of an adapter in 4 bits (NF4, Dettmers et al.
2023), on NVIDIA GPUs alone.
"""

from typing import Any

import torch

from distill.config import TrainConfig
from distill.errors import UsageError


def refuse_unusable(config: TrainConfig) -> None:
    """Raise UsageError where 8-bit moments or a 4-bit base are asked for and cannot be had here."""
    if config.quantise != "none" and config.tune == "full":
        raise UsageError(
            f"quantise {config.quantise} freezes the base in 4 bits, so that only adapters can train. Use tune: lora, "
            "or quantise: none."
        )
    for asked in (f"quantise {config.quantise}", f"optimizer {config.optimizer}"):
        if not asked.endswith((" none", " adamw")):
            quantising_library(asked, device=config.device)


def quantising_library(asked: str, *, device: str = "cuda") -> Any:
    """The module bitsandbytes. Raises UsageError where it, or the GPU that it needs, is missing."""
    if not torch.cuda.is_available() or not device.startswith(("auto", "cuda")):
        raise UsageError(
            f"{asked} needs an NVIDIA GPU: device is {device} and torch sees {torch.cuda.device_count()}. Leave it at "
            "the default to train here."
        )
    try:
        import bitsandbytes
    except ImportError as error:
        raise UsageError(f"{asked} needs bitsandbytes, which is not installed. Install distill[quantised].") from error
    return bitsandbytes


def loading_options(config: TrainConfig, device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
    """What transformers loads a 4-bit base with: NF4 with doubly quantised scales; nothing for full width."""
    if config.quantise == "none":
        return {}
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantise,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return {"quantization_config": quantisation, "device_map": {"": device}}
