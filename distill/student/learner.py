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
from distill.student.balance import balanced, norm_of, smoothed
from distill.student.batch import Example, collate, micro_batches
from distill.student.checkpoint import FEATURE, MODEL, OPTIMIZER, State
from distill.student.contrast import candidates_of
from distill.student.losses.contrastive import Candidates
from distill.student.losses.feature import FeatureAdapter
from distill.student.model import Student
from distill.student.objective import Objective, TeacherView
from distill.student.optimizer import adamw, learning_rate_factor, optimizer_tensors, restore_optimizer
from distill.student.stage import StagePlan

# Of the gradient scale of float16: a scale that training has still to bring down must not hinder a measurement.
_MEASURING_SCALES = (1.0, 2.0**-6, 2.0**-12)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """One optimizer step. ``losses`` has means over its trained tokens: "total" as weighted, the others as they are."""

    losses: dict[str, float]
    num_tokens: int
    grad_norm: float  # before clipping; infinite where float16 overflowed and the step was left out
    learning_rate: float
    weights: dict[str, float]  # of the losses, as gradient balancing left them


class Learner:
    """Takes optimizer steps; see ``step``."""

    def __init__(self, student: Student, view: TeacherView, config: TrainConfig, plan: StagePlan) -> None:
        self.student = student
        self.adapter: FeatureAdapter | None = None
        self.norms: dict[str, float] | None = None  # smoothed gradient norms of the losses, once measured
        self._config, self._plan = config, plan
        stage, weights, device = plan.stage, plan.stage.weights, student.precision.device
        if (weights.feature > 0 or weights.contrastive > 0) and view.projection is not None:
            torch.manual_seed(derived_seed(config.seed, plan.number, "feature"))
            self.adapter = FeatureAdapter(student.hidden_size, view.projection).to(device)
        needs_coords = self.adapter is not None or (weights.kl > 0 and stage.tail == "low_rank")
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
        num_tokens = sum(example.num_trained for example in examples)
        candidates = self._candidates(examples) if num_tokens else None
        if self._plan.stage.balance and number % self._plan.stage.balance_every == 0 and num_tokens:
            self._balance(examples, candidates, number)
        torch.manual_seed(derived_seed(self._config.seed, self._plan.number, f"step {number}"))
        factor = learning_rate_factor(number, num_steps=self._plan.num_steps, warmup=self._config.warmup)
        for param_group in self._optimizer.param_groups:
            param_group["lr"] = self._plan.stage.learning_rate * factor
        totals: dict[str, Tensor] = {}
        for group in micro_batches(examples, self._config.micro_batch_tokens):
            batch = collate(group, self._projection).to(self.student.precision.device)
            sums = self._objective(batch, candidates)
            self._scaler.scale(sums.weighted / num_tokens).backward()
            for name, value in {"total": sums.weighted.detach(), **sums.named}.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value
        losses = {name: float(value) / num_tokens for name, value in totals.items()}
        return StepFigures(
            losses=losses,
            num_tokens=num_tokens,
            grad_norm=self._update(losses, number) if num_tokens else 0.0,
            learning_rate=self._plan.stage.learning_rate * factor,
            weights={name: value for name, value in self._objective.weights.model_dump().items() if value > 0},
        )

    def _candidates(self, examples: list[Example]) -> Candidates | None:
        """What the step's sequences are told apart from, where there is a contrastive loss."""
        if self._plan.stage.weights.contrastive > 0 and self._projection is not None:
            return candidates_of(examples, self._projection, self.student.precision.device)
        return None

    def _balance(self, examples: list[Example], candidates: Candidates | None, number: int) -> None:
        """Measure each loss's gradient norm on the examples of a step and weigh anew."""
        scale = self._scaler.get_scale()
        measured: dict[str, float] = {}
        for factor in _MEASURING_SCALES if self._scaler.is_enabled() else (1.0,):
            torch.manual_seed(derived_seed(self._config.seed, self._plan.number, f"balance {number}"))
            measured = self._gradient_norms(examples, candidates, scale=scale * factor)
            if all(math.isfinite(norm) for norm in measured.values()):
                break
        self._weigh(smoothed(self.norms, measured))

    def _gradient_norms(
        self, examples: list[Example], candidates: Candidates | None, *, scale: float
    ) -> dict[str, float]:
        """The gradient norm of each loss's mean over the tokens of a step, whatever the micro-batches."""
        share = scale / sum(example.num_trained for example in examples)
        parameters = self.student.shared()
        totals: dict[str, list[Tensor]] = {}
        for group in micro_batches(examples, self._config.micro_batch_tokens):
            batch = collate(group, self._projection).to(self.student.precision.device)
            for name, gradients in self._objective.gradients(batch, candidates, parameters, scale=share).items():
                before = totals.get(name)
                totals[name] = gradients if before is None else [a + b for a, b in zip(before, gradients, strict=True)]
        return {name: norm_of(gradients) / scale for name, gradients in totals.items()}

    def _weigh(self, norms: dict[str, float] | None) -> None:
        self.norms = norms
        self._objective.weights = balanced(self._plan.stage.weights, norms)

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

    def restore(self, folder: Path, state: State) -> None:
        """Put back all but the student's own weights, which are loaded from the checkpoint. ``folder`` is verified."""
        try:
            restore_optimizer(self._optimizer, self._parameters, load_file(folder / OPTIMIZER))
        except KeyError as error:
            raise CorruptionError(
                f"{folder / OPTIMIZER} belongs to another student: it has {error}. Restore the checkpoint from a copy."
            ) from error
        self.restore_adapter(folder)
        if state.scaler is not None and self._scaler.is_enabled():
            self._scaler.load_state_dict(state.scaler)
        self._weigh(state.balance)

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
