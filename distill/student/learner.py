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

from distill.config import TrainConfig, WeightsConfig
from distill.errors import CorruptionError, DataError
from distill.student.balance import balanced, smoothed
from distill.student.batch import Example, collate, rank_batches
from distill.student.checkpoint import FEATURE, MODEL, OPTIMIZER, State
from distill.student.contrast import candidates_of
from distill.student.losses.contrastive import TeacherVectors
from distill.student.model import Student
from distill.student.objective import Objective, TeacherView, attention_loss_of, feature_adapter_of
from distill.student.optimizer import learning_rate_factor, make_optimizer, optimizer_tensors, restore_optimizer
from distill.student.ranks import ALONE, Ranks
from distill.student.schedule import temperature_at, weights_at
from distill.student.sharding import gradient_norm, is_sharded, scale_gradients, whole
from distill.student.stage import StagePlan
from distill.student.tokenizer import save_tokenizer

# Of the gradient scale of float16: a scale that training has still to bring down must not hinder a measurement.
_MEASURING_SCALES = (1.0, 2.0**-6, 2.0**-12)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """One optimizer step. ``losses`` has means over its trained tokens: "total" as weighted, the others as they are."""

    losses: dict[str, float]
    num_tokens: int
    grad_norm: float  # before clipping; infinite where float16 overflowed and the step was left out
    learning_rate: float
    weights: dict[str, float]  # of the losses, as schedule and gradient balancing left them
    domain_weights: dict[str, float]  # factors on the losses of domains, as gradient balancing left them
    temperature: float
    norms: dict[str, float]  # gradient norms of single losses and domains, where this step measured them


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Whole tensors of everything that changes, on the CPU; ``weights`` is None where the student has them itself."""

    weights: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]
    feature: dict[str, Tensor] | None


class Learner:
    """Takes optimizer steps; see ``step``. All ranks call its methods together."""

    def __init__(
        self, student: Student, view: TeacherView, config: TrainConfig, plan: StagePlan, ranks: Ranks = ALONE
    ) -> None:
        self.student = student
        self.norms: dict[str, float] | None = None  # smoothed gradient norms of losses and domains, once measured
        self._config, self._plan, self._view, self._ranks = config, plan, view, ranks
        stage, weights, device = plan.stage, plan.stage.weights, student.precision.device
        torch.manual_seed(derived_seed(config.seed, plan.number, "feature"))
        self.adapter = feature_adapter_of(student, view, stage)
        needs_coords = self.adapter is not None or (weights.kl > 0 and stage.tail == "low_rank")
        self._projection = view.projection if needs_coords else None
        self._row_length = config.max_length if config.packing else None
        self.attention = attention_loss_of(student, view, stage)
        self._temperature = temperature_at(stage, 0.0)
        self._objective = self._objective_at(self._temperature)
        self._parameters = [*student.trainable(), *self._adapter_parameters()]
        self._shared = student.shared()
        ranks.take_first([parameter for _, parameter in self._parameters if not is_sharded(parameter)])
        self._optimizer = make_optimizer(self._parameters, config, learning_rate=stage.learning_rate)
        self._scaler = torch.amp.GradScaler(device.type, enabled=student.precision.scales_gradients)
        self._scaler.scale(torch.zeros((), device=device))  # makes the scale, also for a rank without a sequence

    def step(self, examples: list[Example], number: int) -> StepFigures:
        """Take optimizer step ``number``, counted from 0, on ``examples``, which all ranks give alike.

        The loss is the sum over the step's trained tokens divided by their number, whatever the micro-batches and
        ranks. Dropout is drawn from (seed, stage, step, rank), so a resumed run draws the same and no random state
        needs to be kept. Raises DataError when the loss is not finite.
        """
        num_tokens = sum(example.num_trained for example in examples)
        candidates = self._candidates(examples) if num_tokens else None
        self._move_to(number)
        norms = self._measured(examples, candidates, number) if num_tokens else {}
        self._seed(f"step {number}")
        rate = self._plan.stage.learning_rate * learning_rate_factor(
            number, num_steps=self._plan.num_steps, warmup=self._config.warmup
        )
        for param_group in self._optimizer.param_groups:
            param_group["lr"] = rate
        self._objective.weights = self._weights_at(number)
        factors = self._domain_factors(number)
        losses = self._accumulate(examples, candidates, factors)
        return StepFigures(
            losses=losses,
            num_tokens=num_tokens,
            grad_norm=self._update(losses, number) if num_tokens else 0.0,
            learning_rate=rate,
            weights={name: value for name, value in self._objective.weights.model_dump().items() if value > 0},
            domain_weights=factors,
            temperature=self._temperature,
            norms={name: norm for name, norm in norms.items() if math.isfinite(norm)},
        )

    def _accumulate(
        self, examples: list[Example], candidates: TeacherVectors | None, factors: dict[str, float]
    ) -> dict[str, float]:
        """Leave the step's gradient on the parameters, summed over ranks; the means of its losses over tokens."""
        num_tokens = sum(example.num_trained for example in examples)
        totals: dict[str, Tensor] = {}
        for group, counts in self._micro_batches(examples):
            batch = collate(group, self._projection, row_length=self._row_length).to(self.student.precision.device)
            sums = self._objective(batch, candidates)
            weighted = sums.weighted * (factors.get(group[0].domain, 1.0) if counts else 0.0)
            self._scaler.scale(weighted / num_tokens).backward()
            if counts:
                for name, value in {"total": weighted.detach(), **sums.named}.items():
                    totals[name] = totals.get(name, torch.zeros_like(value)) + value
        self._ranks.sum_gradients([parameter for _, parameter in self._parameters if not is_sharded(parameter)])
        parts = self._ranks.gather({name: float(value) for name, value in totals.items()})
        names = list(dict.fromkeys(name for part in parts for name in part))
        return {name: sum(part.get(name, 0.0) for part in parts) / num_tokens for name in names}

    def _micro_batches(self, examples: list[Example]) -> list[tuple[list[Example], bool]]:
        return rank_batches(
            examples,
            self._config.micro_batch_tokens,
            self._ranks,
            in_step=self.student.is_sharded,
            row_length=self._row_length,
            by_domain=self._plan.stage.balance in ("domain", "both"),
        )

    def _seed(self, what: str) -> None:
        own = (what, f"rank {self._ranks.rank}") if self._ranks.rank else (what,)
        torch.manual_seed(derived_seed(self._config.seed, self._plan.number, *own))

    def _move_to(self, number: int) -> None:
        """Take the temperature of a step."""
        temperature = temperature_at(self._plan.stage, number / self._plan.num_steps)
        if temperature != self._temperature:
            self._temperature, self._objective = temperature, self._objective_at(temperature)

    def _objective_at(self, temperature: float) -> Objective:
        stage = self._plan.stage.model_copy(update={"temperature": temperature})
        return Objective(
            self.student,
            self._view,
            stage,
            adapter=self.adapter,
            head_chunk=self._config.head_chunk,
            attention=self.attention,
        )

    def _weights_at(self, number: int) -> WeightsConfig:
        """The weights of a step: scheduled, then balanced."""
        weights = weights_at(self._plan.stage, number / self._plan.num_steps)
        if self._plan.stage.balance not in ("loss", "both"):
            return weights
        return weights.model_copy(update=balanced(weights.model_dump(), self.norms))

    def _domain_factors(self, number: int) -> dict[str, float]:
        """What the losses of each domain are multiplied by, so that its scheduled share is its part of the gradient."""
        if self._plan.stage.balance not in ("domain", "both"):
            return {}
        shares = {_domain_key(domain): share for domain, share in self._plan.scheduled_at(number).items()}
        weights = balanced(shares, self.norms)
        return {
            domain: weights[_domain_key(domain)] / shares[_domain_key(domain)]
            if shares[_domain_key(domain)] > 0
            else 1.0
            for domain in self._plan.domains
        }

    def _candidates(self, examples: list[Example]) -> TeacherVectors | None:
        """What the step's sequences are told apart from, where there is a contrastive loss."""
        if self._plan.stage.weights.contrastive > 0 and self._projection is not None:
            return candidates_of(examples, self._projection, self.student.precision.device)
        return None

    def _measured(self, examples: list[Example], candidates: TeacherVectors | None, number: int) -> dict[str, float]:
        """Gradient norms of losses and domains where a step is to measure them, to balance by or to look at."""
        stage = self._plan.stage
        balances = bool(stage.balance) and number % stage.balance_every == 0
        shows = stage.norms_every is not None and number % stage.norms_every == 0
        if not balances and not shows:
            return {}
        measured = self._measure(examples, candidates, number, kinds="both" if shows else str(stage.balance))
        if balances:
            self.norms = smoothed(self.norms, measured)
        return measured

    def _measure(
        self, examples: list[Example], candidates: TeacherVectors | None, number: int, *, kinds: str
    ) -> dict[str, float]:
        """Measure the gradient norms of losses, domains or both on the examples of a step."""
        scale = self._scaler.get_scale()
        measured: dict[str, float] = {}
        for factor in _MEASURING_SCALES if self._scaler.is_enabled() else (1.0,):
            self._seed(f"balance {number}")
            measured = {
                name: self._norm_alone(weights, part, candidates, num_tokens=num_tokens, scale=scale * factor)
                for name, weights, part, num_tokens in self._parts(examples, number, kinds)
            }
            if all(math.isfinite(norm) for norm in measured.values()):
                break
        return measured

    def _parts(
        self, examples: list[Example], number: int, kinds: str
    ) -> list[tuple[str, WeightsConfig, list[Example], float]]:
        """What is measured alone, each loss and each domain: name, weights, examples and the tokens to divide by.

        A domain's losses are divided by its share of the sequences times the step's tokens. So its norm times its share
        is its part of the step's gradient, which longer sequences make larger.
        """
        weights = weights_at(self._plan.stage, number / self._plan.num_steps)
        num_tokens = sum(example.num_trained for example in examples)
        parts: list[tuple[str, WeightsConfig, list[Example], float]] = []
        if kinds in ("loss", "both"):
            nothing = dict.fromkeys(WeightsConfig.model_fields, 0.0)
            for name in (name for name, weight in weights.model_dump().items() if weight > 0):
                parts.append((name, WeightsConfig.model_validate({**nothing, name: 1.0}), examples, num_tokens))
        if kinds in ("domain", "both"):
            for domain in self._plan.domains:
                own = [example for example in examples if example.domain == domain]
                if any(example.num_trained for example in own):
                    parts.append((_domain_key(domain), weights, own, num_tokens * len(own) / len(examples)))
        return parts

    def _norm_alone(
        self,
        weights: WeightsConfig,
        examples: list[Example],
        candidates: TeacherVectors | None,
        *,
        num_tokens: float,
        scale: float,
    ) -> float:
        """The norm of the gradient of a loss's sum over ``num_tokens``, on the parameters that losses share."""
        share = scale / num_tokens
        self._objective.weights = weights
        for group, counts in self._micro_batches(examples):
            batch = collate(group, self._projection, row_length=self._row_length).to(self.student.precision.device)
            (self._objective(batch, candidates).weighted * (share if counts else 0.0)).backward()
        self._ranks.sum_gradients([parameter for parameter in self._shared if not is_sharded(parameter)])
        norm = gradient_norm(self._shared, self._ranks)
        self._optimizer.zero_grad(set_to_none=True)
        return norm / scale

    def _update(self, losses: dict[str, float], number: int) -> float:
        self._scaler.unscale_(self._optimizer)
        grad_norm = self._clip([parameter for _, parameter in self._parameters])
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

    def _clip(self, parameters: list[nn.Parameter]) -> float:
        """Scale gradients down to the largest norm that is allowed; the norm before."""
        if not self.student.is_sharded:
            return float(torch.nn.utils.clip_grad_norm_(parameters, self._config.clip))
        norm = gradient_norm(parameters, self._ranks)
        if math.isfinite(norm):
            scale_gradients(parameters, min(1.0, self._config.clip / (norm + 1e-6)))
        return norm

    def snapshot(self) -> Snapshot:
        """What ``save`` writes; on ranks other than the first nothing is kept."""
        feature = None if self.adapter is None else self.adapter.state_dict()
        first = self._ranks.is_first
        return Snapshot(
            weights=self.student.weights(keep=first),
            optimizer=optimizer_tensors(self._optimizer, self._parameters, keep=first),
            feature=None if feature is None else {name: whole(value) for name, value in feature.items()},
        )

    def save(self, folder: Path, tokenizer: Any, snapshot: Snapshot) -> None:
        """Write model (the adapter alone under LoRA), tokenizer, optimizer and feature adapter into ``folder``."""
        self.student.save(folder / MODEL, snapshot.weights)
        save_tokenizer(tokenizer, folder / MODEL)
        save_file(snapshot.optimizer, folder / OPTIMIZER)
        if snapshot.feature is not None:
            save_file(snapshot.feature, folder / FEATURE)

    def scaler_state(self) -> dict[str, int | float] | None:
        """The gradient scale of float16 as plain numbers."""
        return dict(self._scaler.state_dict()) if self._scaler.is_enabled() else None

    def restore(self, folder: Path, state: State) -> None:
        """Put back all but the student's own weights, which are loaded from the checkpoint. ``folder`` is verified."""
        try:
            restore_optimizer(self._optimizer, self._parameters, folder / OPTIMIZER)
        except KeyError as error:
            raise CorruptionError(
                f"{folder / OPTIMIZER} belongs to another student: it has {error}. Restore the checkpoint from a copy."
            ) from error
        self.restore_adapter(folder)
        if state.scaler is not None and self._scaler.is_enabled():
            self._scaler.load_state_dict(state.scaler)
        self.norms = state.balance

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


def _domain_key(domain: str) -> str:
    """The name of a domain's gradient norm, beside those of losses."""
    return f"domain/{domain}"


def derived_seed(*key: int | str) -> int:
    """A seed that depends on ``key`` alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")
