"""A cache's projection flows in, a model of the teacher's tail on the student's device flows out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.cache.projection import Projection
from distill.student.losses.kl import wide


@dataclass(frozen=True, slots=True, kw_only=True)
class TailModel:
    """The map from projected hidden states back to logits: ``Projection.tail_logits`` on a device."""

    basis: Tensor  # [R, V] compute dtype
    bias: Tensor  # [V] float32
    logit_scale: float
    soft_cap: float | None

    @staticmethod
    def of(projection: Projection, *, device: torch.device, dtype: torch.dtype) -> "TailModel":
        """The projection's basis and bias as tensors; ``dtype`` is that of the matrix product."""
        return TailModel(
            basis=torch.from_numpy(projection.basis_VR).to(device=device, dtype=dtype).T,
            bias=torch.from_numpy(projection.bias_V).to(device=device, dtype=torch.float32),
            logit_scale=projection.logit_scale,
            soft_cap=projection.soft_cap,
        )

    def logits(self, coords_NR: Tensor) -> Tensor:
        """``scale cap(B c + b)``, [N, V] float32; only differences within a row mean anything."""
        logits_NV = wide(self._product(coords_NR))
        logits_NV += self.bias
        if self.soft_cap is not None:
            logits_NV = self.soft_cap * torch.tanh(logits_NV / self.soft_cap)
        return logits_NV * self.logit_scale if self.logit_scale != 1.0 else logits_NV

    def with_bias_apart(self, coords_NR: Tensor) -> tuple[Tensor, Tensor | None]:
        """``logits`` as two parts to be added up, the first a new tensor, where possible in the compute dtype."""
        if self.soft_cap is None and self.logit_scale == 1.0:
            return self._product(coords_NR), self.bias
        return self.logits(coords_NR), None

    def _product(self, coords_NR: Tensor) -> Tensor:
        return coords_NR.to(self.basis.dtype) @ self.basis
