"""Configuration: a YAML file and command-line options flow in, frozen pydantic models flow out.

One file may hold both halves of a job: ``cache:`` for ``distill cache-teacher`` and ``train:`` for
``distill train``. Unknown keys are errors that name the nearest known key. A stage of training is configuration,
not a class: ``resolve_stage`` lays what the user wrote over the defaults of stages 1, 2 and 3.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.errors import UsageError

Overlong = Literal["truncate", "reject", "split"]
Tail = Literal["low_rank", "bucket"]
Schedule = Literal["constant", "linear", "cosine", "step"]
DivergenceName = Literal["forward", "reverse", "js", "skew"]


def _positive_temperatures(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values or len(set(values)) != len(values) or min(values) <= 0:
        raise ValueError(f"temperatures must be distinct and greater than 0, got {list(values)}")
    return values


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetsConfig(_Model):
    """What is kept for each position; part of a cache's identity."""

    top_k: int = Field(64, ge=1, description="log-probabilities kept for each position")
    temperatures: Annotated[tuple[float, ...], AfterValidator(_positive_temperatures)] = Field(
        (4.0, 2.0, 1.0), description="temperatures that students can train at, each with its log_z and log_tail"
    )
    hidden_bytes: int = Field(
        128, ge=0, description="bytes for each position's projected final hidden state; 0 keeps none"
    )


class ColumnsConfig(_Model):
    """Names of the input columns, for data whose names are not among the usual ones."""

    prompt: str | None = None
    input: str | None = None
    response: str | None = None
    messages: str | None = None
    text: str | None = None


class CacheConfig(_Model):
    """Everything that ``distill cache-teacher`` needs."""

    teacher: str = Field(description="model folder or hub name")
    revision: str | None = Field(None, description="hub revision of the teacher")
    data: dict[str, tuple[str, ...]] = Field(description="domain -> files or hub data sets to train on")
    eval: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="domain -> files held out for evaluation"
    )
    eval_fraction: float = Field(
        0.05, ge=0, lt=1, description="hashed share of the rows of a domain without eval files that is held out"
    )
    columns: ColumnsConfig = ColumnsConfig()
    out: str = Field(description="folder of the cache")
    engine: Literal["vllm", "transformers"] | None = Field(
        None, description="default: vllm where it is installed, else transformers"
    )
    engine_options: dict[str, Any] = Field(
        default_factory=dict,
        description="passed to the engine as they are, for example tensor_parallel_size, gpu_memory_utilization",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="weights and activations")
    head_dtype: Literal["float32", "model"] = Field("float32", description="precision of the logits in capture")
    targets: TargetsConfig = TargetsConfig()
    max_length: int = Field(2048, ge=2, description="tokens in a sequence")
    overlong: Overlong = Field("truncate", description="what becomes of a longer row")
    unit_rows: int = Field(1024, ge=1, description="input rows in a unit; a crash costs one unit")
    calibration_tokens: int | None = Field(
        None, ge=1, description="tokens that fit the projection; default: 16 for each hidden dimension"
    )
    seed: int = Field(42, description="draws the calibration rows")
    trust_remote_code: bool = Field(False, description="run code that the teacher's folder brings; recorded")


class LoraConfig(_Model):
    """Low-rank adapters, as in peft."""

    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


class ShareConfig(_Model):
    """A domain's share as a function of training progress in [0, 1]. A plain number is a constant share."""

    schedule: Schedule = "constant"
    start: float = Field(1.0, ge=0)
    end: float | None = Field(None, ge=0, description="default: start")
    at: float = Field(0.5, ge=0, le=1, description="progress at which a step schedule switches")

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"start": value} if isinstance(value, int | float) else value


class WeightsConfig(_Model):
    """Weights of the losses."""

    kl: float = Field(1.0, ge=0)
    ce: float = Field(0.0, ge=0)
    feature: float = Field(0.0, ge=0)
    attention: float = Field(0.0, ge=0, description="not available yet: anything but 0 is refused")
    contrastive: float = Field(0.0, ge=0)


class StageConfig(_Model):
    """One stage: what it trains on and how. Shares are normalised, so they need not sum to 1."""

    shares: dict[str, ShareConfig] = Field(description="domain -> its share of the training sequences")
    temperature: float = Field(gt=0)
    weights: WeightsConfig
    tail: Tail = "low_rank"
    divergence: DivergenceName = Field("forward", description="what weights.kl weighs; see docs/losses.md")
    beta: float | None = Field(
        None, gt=0, lt=1, description="the teacher's part in the mixture of js (default 0.5) and skew (default 0.1)"
    )
    contrastive_temperature: float = Field(0.1, gt=0, description="τ of the contrastive loss")
    learning_rate: float = Field(gt=0)
    epochs: float = Field(gt=0)
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_size: int = Field(ge=1, description="sequences in an optimizer step, over all devices")
    eval_every: int = Field(100, ge=1, description="optimizer steps between evaluations, and between checkpoints")
    eval_rows: int = Field(256, ge=1, description="held-out sequences of each domain that an evaluation reads")
    balance: bool = Field(
        False, description="weigh losses by their gradient norms, so that weights are parts of the gradient"
    )
    balance_every: int = Field(50, ge=1, description="optimizer steps between two measurements of gradient norms")
    sampling: Literal["uniform", "evaluation"] = Field(
        "uniform", description="evaluation: groups with a higher held-out loss come more often; see docs/stages.md"
    )
    sampling_by: str = Field("domain", min_length=1, description="what a group is: domain, or a metadata key")
    sampling_floor: float = Field(
        0.3, ge=0, le=1, description="part of a group's own share that no evaluation can take away"
    )


class TrainConfig(_Model):
    """Everything that ``distill train`` needs."""

    cache: str = Field(description="folder of the cache")
    student: str = Field(description="model folder or hub name")
    student_layers: int | None = Field(None, ge=1, description="keep this many evenly spaced layers of the student")
    out: str = Field(description="folder of the run; stages go into stage1, stage2, stage3")
    general: str = Field("general", description="domain that stage 1 trains on")
    domain: str = Field("medical", description="domain that stages 2 and 3 move to")
    tune: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the device has it, else fp32"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    max_length: int = Field(512, ge=2, description="longer cached sequences are cut to this many tokens")
    micro_batch_tokens: int = Field(4096, ge=2, description="tokens in one forward and backward pass")
    head_chunk: int = Field(512, ge=1, description="tokens whose logits exist at the same time")
    gradient_checkpointing: bool = False
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    seed: int = 42
    shard_window: int = Field(4, ge=1, description="shards whose rows are shuffled together and held in memory")
    wandb: bool = False
    allow_incomplete: bool = Field(False, description="train on the committed units of an unsealed cache")
    trust_remote_code: bool = False
    stages: dict[int, dict[str, Any]] = Field(
        default_factory=dict, description="stage number -> keys of StageConfig that differ from its defaults"
    )

    @model_validator(mode="after")
    def _stages_are_valid(self) -> "TrainConfig":
        for number in self.stages:
            try:
                self.stage(number)
            except ValidationError as error:
                problems = "; ".join(_explain(StageConfig, detail) for detail in error.errors())
                raise ValueError(f"stages.{number}: {problems}") from error
        return self

    def stage(self, number: int) -> StageConfig:
        """The stage with its defaults filled in; ``shares`` written by the user replace the defaults whole."""
        if number not in (1, 2, 3):
            raise ValueError(f"there are stages 1, 2 and 3, no {number}")
        defaults = _stage_defaults(self.general, self.domain)[number]
        given = dict(self.stages.get(number, {}))
        if isinstance(given.get("weights"), dict):
            given["weights"] = {**defaults["weights"], **given["weights"]}
        return StageConfig.model_validate({**defaults, **given})


def _stage_defaults(general: str, domain: str) -> dict[int, dict[str, Any]]:
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


class JobConfig(_Model):
    """A configuration file: either half may be missing."""

    cache: CacheConfig | None = None
    train: TrainConfig | None = None


Model = TypeVar("Model", bound=BaseModel)


def read_section(path: Path | None, section: Literal["cache", "train"]) -> dict[str, Any]:
    """The ``cache`` or ``train`` part of a YAML file as plain data, or nothing where no file is given.

    Raises UsageError when the file is missing, is not YAML, or has an unknown top-level key.
    """
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}. Check --config.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}. Correct the file named by --config.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must be a mapping with the keys 'cache' and 'train', not a {type(content).__name__}.")
    for key in content:
        if key not in JobConfig.model_fields:
            raise UsageError(f"{path}: unknown key '{key}'{_nearest(str(key), JobConfig)}.")
    part = content.get(section) or {}
    if not isinstance(part, dict):
        raise UsageError(f"{path}: '{section}' must be a mapping, not a {type(part).__name__}.")
    return part


def validated(model: type[Model], values: dict[str, Any], *, origin: str) -> Model:
    """The model made of ``values``, or a UsageError that names every wrong key, why, and the nearest right one."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(model, detail) for detail in error.errors()]
        raise UsageError(f"{origin}: " + "; ".join(problems) + ".") from error


def _explain(model: type[BaseModel], detail: Any) -> str:
    path = [str(part) for part in detail["loc"]]
    where = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{where}'{_nearest(path[-1], _owner(model, path[:-1]))}"
    if detail["type"] == "missing":
        return f"'{where}' is missing (option --{path[-1].replace('_', '-')})"
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"'{where}': {message}" if where else message


def _owner(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for part in path:
        field = model.model_fields.get(part)
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return model


def _nearest(key: str, model: type[BaseModel]) -> str:
    known = list(model.model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known keys are {', '.join(known)}"
