"""The examples of an optimizer step flow in, a changed student and the step's figures flow out.

Owns all that changes in training: the student's weights, the feature adapter, AdamW's moments and the gradient scale.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.config import TrainConfig
from distill.errors import CorruptionError, DataError
from distill.student.batch import Example, collate, micro_batches
from distill.student.checkpoint import FEATURE, MODEL, OPTIMIZER
from distill.student.losses.feature import FeatureAdapter
from distill.student.model import Student
from distill.student.objective import Objective, TeacherView
from distill.student.optimizer import adamw, learning_rate_factor, optimizer_tensors, restore_optimizer
from distill.student.stage import StagePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """One optimizer step. ``losses`` has means over its trained tokens: "total" as weighted, the others as they are."""

    losses: dict[str, float]
    num_tokens: int
    grad_norm: float  # before clipping; infinite where float16 overflowed and the step was left out
    learning_rate: float


class Learner:
    """Takes optimizer steps; see ``step``."""

    def __init__(self, student: Student, view: TeacherView, config: TrainConfig, plan: StagePlan) -> None:
        self.student = student
        self.adapter: FeatureAdapter | None = None
        self._config, self._plan = config, plan
        stage, weights, device = plan.stage, plan.stage.weights, student.precision.device
        if weights.feature > 0 and view.projection is not None:
            torch.manual_seed(derived_seed(config.seed, plan.number, "feature"))
            self.adapter = FeatureAdapter(student.hidden_size, view.projection).to(device)
        needs_coords = weights.feature > 0 or (weights.kl > 0 and stage.tail == "low_rank")
        self._projection = view.projection if needs_coords else None
        self._objective = Objective(student, view, stage, adapter=self.adapter, head_chunk=config.head_chunk)
        self._parameters = [*student.trainable(), *self._adapter_parameters()]
        self._optimizer = adamw(self._parameters, learning_rate=stage.learning_rate, weight_decay=config.weight_decay)
        self._scaler = torch.amp.GradScaler(device.type, enabled=student.precision.scales_gradients)

    def step(self, examples: list[Example], number: int) -> StepFigures:
        """Take optimizer step ``number``, counted from 0, on ``examples``.

        The loss is the sum over the step's trained tokens divided by their number, whatever the micro-batches. Dropout
        is drawn from (seed, stage, step), so a resumed run draws the same and no random state needs to be kept. Raises
        DataError when the loss is not finite.
        """
        torch.manual_seed(derived_seed(self._config.seed, self._plan.number, f"step {number}"))
        factor = learning_rate_factor(number, num_steps=self._plan.num_steps, warmup=self._config.warmup)
        for param_group in self._optimizer.param_groups:
            param_group["lr"] = self._plan.stage.learning_rate * factor
        num_tokens = sum(example.num_trained for example in examples)
        totals: dict[str, Tensor] = {}
        for group in micro_batches(examples, self._config.micro_batch_tokens):
            batch = collate(group, self._projection).to(self.student.precision.device)
            sums = self._objective(batch)
            self._scaler.scale(sums.weighted / num_tokens).backward()
            for name, value in {"total": sums.weighted.detach(), **sums.named}.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value
        losses = {name: float(value) / num_tokens for name, value in totals.items()}
        return StepFigures(
            losses=losses,
            num_tokens=num_tokens,
            grad_norm=self._update(losses, number) if num_tokens else 0.0,
            learning_rate=self._plan.stage.learning_rate * factor,
        )

    def _update(self, losses: dict[str, float], number: int) -> float:
        self._scaler.unscale_(self._optimizer)
        parameters = [parameter for _, parameter in self._parameters]
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._config.clip))
        overflow_is_normal = self._scaler.is_enabled()
        if not math.isfinite(losses["total"]) or not (overflow_is_normal or math.isfinite(grad_norm)):
            raise DataError(
                f"step {number + 1} of stage {self._plan.number} has loss {losses['total']:g} and gradient norm "
                f"{grad_norm:g}. The last checkpoint is whole. Lower stages.{self._plan.number}.learning_rate or use "
                "--precision fp32, and train into another --out."
            )
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write model (the adapter alone under LoRA), tokenizer, optimizer and feature adapter into ``folder``."""
        self.student.save(folder / MODEL)
        tokenizer.save_pretrained(folder / MODEL)
        save_file(optimizer_tensors(self._optimizer, self._parameters), folder / OPTIMIZER)
        if self.adapter is not None:
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.adapter.state_dict().items()}
            save_file(tensors, folder / FEATURE)

    def scaler_state(self) -> dict[str, int | float] | None:
        """The gradient scale of float16 as plain numbers."""
        return dict(self._scaler.state_dict()) if self._scaler.is_enabled() else None

    def restore(self, folder: Path, scaler_state: dict[str, int | float] | None) -> None:
        """Put back all but the student's own weights, which are loaded from the checkpoint. ``folder`` is verified."""
        try:
            restore_optimizer(self._optimizer, self._parameters, load_file(folder / OPTIMIZER))
        except KeyError as error:
            raise CorruptionError(
                f"{folder / OPTIMIZER} belongs to another student: it has {error}. Restore the checkpoint from a copy."
            ) from error
        self.restore_adapter(folder)
        if scaler_state is not None and self._scaler.is_enabled():
            self._scaler.load_state_dict(scaler_state)

    def restore_adapter(self, folder: Path) -> None:
        """Take the feature adapter of a checkpoint, of an earlier stage for example, where it has one of this shape."""
        path = folder / FEATURE
        if self.adapter is None or not path.is_file():
            return
        tensors = load_file(path)
        own = self.adapter.state_dict()
        if {name: value.shape for name, value in tensors.items()} == {name: value.shape for name, value in own.items()}:
            self.adapter.load_state_dict(tensors)

    def _adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        named = [] if self.adapter is None else self.adapter.named_parameters()
        return [(f"feature.{name}", parameter) for name, parameter in named]


def derived_seed(*key: int | str) -> int:
    """A seed that depends on ``key`` alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
