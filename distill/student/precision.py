"""The words of the configuration flow in, a device and the dtypes to compute in flow out."""

from dataclasses import dataclass

import torch

from distill.errors import UsageError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Weights that train are always float32; ``compute_dtype`` is that of matrix products and of frozen weights."""

    device: torch.device
    compute_dtype: torch.dtype

    @property
    def name(self) -> str:
        """What ``train.precision`` calls it."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.compute_dtype)

    @property
    def autocast(self) -> bool:
        """Whether a forward pass must cast float32 weights down."""
        return self.compute_dtype != torch.float32

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients need a scale to stay within the range of the dtype."""
        return self.compute_dtype == torch.float16

    def context(self) -> torch.autocast:
        """The autocast context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=self.autocast)


def resolve_precision(device: str, precision: str) -> Precision:
    """``auto`` is the first GPU where there is one, and bf16 where it has it.

    Raises UsageError for a device that is not there, or that holds no numbers (meta).
    """
    resolved = _device(device)
    if precision == "auto":
        has_bf16 = resolved.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if has_bf16 else "fp32"
    return Precision(device=resolved, compute_dtype=_DTYPES[precision])


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # read back, which meta cannot
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"device '{name}' cannot be used: {reason.rstrip('.')}. Set device to auto, cpu, or one that this machine "
            "and this build of torch have; on the command line --set device=cpu."
        ) from error
    return device
