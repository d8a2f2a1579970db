"""Configuration of a stage: what it trains on, by which losses and how. ``distill.config`` hands all of it on.

Shares, temperatures and weights may change with the progress of a stage; here is how that is written down.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

TailShape = Literal["low_rank", "bucket"]
Tail = TailShape | Literal["sampled"]
Schedule = Literal["constant", "linear", "cosine", "step"]
DivergenceName = Literal["forward", "reverse", "js", "skew"]
Negatives = Literal["all", "domain"]


def _balanced_by(value: Any) -> Any:
    return "loss" if value is True else value


class ConfigModel(BaseModel):
    """The base of all configuration: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ShareConfig(ConfigModel):
    """A domain's share, or a weight, as a function of training progress in [0, 1]. A plain number is constant."""

    schedule: Schedule = "constant"
    start: float = Field(1.0, ge=0)
    end: float | None = Field(None, ge=0, description="default: start")
    at: float = Field(0.5, ge=0, le=1, description="progress at which a step schedule switches")

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"start": value} if isinstance(value, int | float) else value

    @property
    def mean(self) -> float:
        """The mean over the whole progress."""
        end = self.start if self.end is None else self.end
        part = {"constant": 0.0, "linear": 0.5, "cosine": 0.5, "step": 1 - self.at}[self.schedule]
        return self.start + (end - self.start) * part


class TemperatureSteps(ConfigModel):
    """Temperatures of the cache, one after the other. A plain list gives each an equal part of the stage."""

    values: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = Field(
        None, description="progress at which the second begins, the third, and so on"
    )

    @model_validator(mode="after")
    def _at_fits(self) -> "TemperatureSteps":
        if self.at is not None and (len(self.at) != len(self.values) - 1 or list(self.at) != sorted(set(self.at))):
            raise ValueError(f"'at' must rise and have {len(self.values) - 1} numbers, one fewer than the temperatures")
        return self


def _mean_of(schedule: dict[str, Any]) -> float:
    try:
        return ShareConfig.model_validate(schedule).mean
    except ValidationError:  # which the schedule itself reports
        return 0.0


class WeightsConfig(ConfigModel):
    """Weights of the losses."""

    kl: float = Field(1.0, ge=0)
    ce: float = Field(0.0, ge=0)
    feature: float = Field(0.0, ge=0)
    attention: float = Field(0.0, ge=0, description="needs a cache with targets.heads")
    contrastive: float = Field(0.0, ge=0)


class AttentionConfig(ConfigModel):
    """What weights.attention weighs: which maps stand against each other, and how far apart they are."""

    measure: Literal["kl", "mse"] = Field("kl", description="distance of two maps; see docs/losses.md")
    layers: dict[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict, description="teacher's layer -> student's; default: kept ones, at the same relative depth"
    )
    heads: dict[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict, description="teacher's head -> student's; default: the mean over heads on both sides"
    )


class FeatureConfig(ConfigModel):
    """What weights.feature weighs beside the final hidden state."""

    layers: Literal["auto", "none"] | dict[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(
        "auto",
        description="teacher's inner layer -> student's; auto: those that the cache holds, at the same relative depth",
    )


class StageConfig(ConfigModel):
    """One stage: what it trains on and how. Shares are normalised, so they need not sum to 1."""

    shares: dict[str, ShareConfig] = Field(description="domain -> its share of the training sequences")
    temperature: float = Field(gt=0, description="or a list of those that follow each other: see temperature_steps")
    temperature_steps: TemperatureSteps | None = Field(
        None, description="where temperature is a list, which may also be written here; temperature is then the last"
    )
    weights: WeightsConfig
    weight_schedules: dict[str, ShareConfig] = Field(
        default_factory=dict, description="weights that were written as a schedule; in weights is then their mean"
    )
    tail: Tail = "low_rank"
    divergence: DivergenceName = Field("forward", description="what weights.kl weighs; see docs/losses.md")
    beta: float | None = Field(
        None, gt=0, lt=1, description="the teacher's part in the mixture of js (default 0.5) and skew (default 0.1)"
    )
    contrastive_temperature: float = Field(0.1, gt=0, description="τ of the contrastive loss")
    contrastive_negatives: Negatives = Field(
        "all", description="sequences that one is told apart from: of all domains, or of its own domain only"
    )
    feature: FeatureConfig = FeatureConfig()
    attention: AttentionConfig = AttentionConfig()
    learning_rate: float = Field(gt=0)
    epochs: float = Field(gt=0)
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_size: int = Field(ge=1, description="sequences in an optimizer step, over all devices")
    eval_every: int = Field(100, ge=1, description="optimizer steps between evaluations, and between checkpoints")
    eval_rows: int = Field(256, ge=1, description="held-out sequences of each domain that an evaluation reads")
    eval_domains: Literal["stage", "all"] = Field(
        "stage", description="all: an evaluation also shows the cache's other domains, which choose no best checkpoint"
    )
    balance: Annotated[Literal[False, "loss", "domain", "both"], BeforeValidator(_balanced_by)] = Field(
        False,
        description="weigh losses, domains or both by their gradient norms, so that weights and shares are parts of "
        "the gradient; true is loss",
    )
    balance_every: int = Field(50, ge=1, description="optimizer steps between two measurements of gradient norms")
    norms_every: int | None = Field(
        None,
        ge=1,
        description="optimizer steps between two measurements of the gradient norms of losses and domains, for the "
        "report alone; null: only those that balance needs",
    )
    sampling: Literal["uniform", "evaluation"] = Field(
        "uniform", description="evaluation: groups with a higher held-out loss come more often; see docs/stages.md"
    )
    sampling_by: str = Field("domain", min_length=1, description="what a group is: domain, or a metadata key")
    sampling_floor: float = Field(
        0.3, ge=0, le=1, description="part of a group's own share that no evaluation can take away"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_schedules(cls, value: Any) -> Any:
        """Schedules, which may be written in the place of numbers, to keys of their own."""
        if not isinstance(value, dict):
            return value
        given = dict(value)
        temperature, weights = given.get("temperature"), given.get("weights")
        if isinstance(temperature, dict) and "schedule" in temperature:
            raise ValueError(
                "temperature: a cache holds a few temperatures and nothing between them, so it moves in steps. Write "
                "[4, 2, 1], or {values: [4, 2, 1], at: [0.5, 0.8]}"
            )
        if isinstance(temperature, list | tuple):
            temperature = {"values": temperature}
        steps = temperature if isinstance(temperature, dict) else given.get("temperature_steps")
        if isinstance(steps, dict):
            given["temperature_steps"] = steps
            given["temperature"] = (list(steps.get("values") or ()) or [1.0])[-1]
        if isinstance(weights, dict):
            schedules = {name: schedule for name, schedule in weights.items() if isinstance(schedule, dict)}
            given["weights"] = {**weights, **{name: _mean_of(schedule) for name, schedule in schedules.items()}}
            if schedules:
                given["weight_schedules"] = {**given.get("weight_schedules", {}), **schedules}
        return given


def stage_defaults(general: str, domain: str) -> dict[int, dict[str, Any]]:
    """What stages 1, 2 and 3 are where the user says nothing."""
    rising = {"schedule": "linear", "start": 0.3, "end": 0.7}
    falling = {"schedule": "linear", "start": 0.7, "end": 0.3}
    return {
        1: {
            "shares": {general: 1.0},
            "temperature": 4.0,
            "weights": {"kl": 0.9, "ce": 0.1},
            "learning_rate": 5e-5,
            "epochs": 3,
            "batch_size": 16,
        },
        2: {
            "shares": {general: falling, domain: rising},
            "temperature": 2.0,
            "weights": {"kl": 0.7, "ce": 0.3, "feature": 0.2, "contrastive": 0.1},
            "learning_rate": 3e-5,
            "epochs": 2,
            "batch_size": 8,
        },
        3: {
            "shares": {domain: 1.0},
            "temperature": 1.0,
            "weights": {"kl": 0.3, "ce": 0.7},
            "learning_rate": 1e-5,
            "epochs": 3,
            "batch_size": 4,
        },
    }
