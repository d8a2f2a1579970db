"""Configuration: a YAML file and command-line options flow in, frozen pydantic models flow out.

One file may hold both halves of a job: ``cache:`` for ``distill cache-teacher`` and ``train:`` for
``distill train``. Unknown keys are errors that name the nearest known key. A stage of training is configuration,
not a class: ``resolve_stage`` lays what the user wrote over the defaults of stages 1, 2 and 3.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from distill.errors import UsageError
from distill.stage_config import (
    AttentionConfig,
    ConfigModel,
    DivergenceName,
    FeatureConfig,
    Schedule,
    ShareConfig,
    StageConfig,
    Tail,
    TailShape,
    TemperatureSteps,
    WeightsConfig,
    stage_defaults,
)

__all__ = [
    "AttentionConfig",
    "CacheConfig",
    "ColumnsConfig",
    "DivergenceName",
    "FeatureConfig",
    "GenerateConfig",
    "JobConfig",
    "LoraConfig",
    "Overlong",
    "SamplesConfig",
    "Schedule",
    "ShareConfig",
    "StageConfig",
    "Tail",
    "TailShape",
    "TargetsConfig",
    "TemperatureSteps",
    "TrainConfig",
    "WeightsConfig",
    "read_section",
    "validated",
]

Overlong = Literal["truncate", "reject", "split"]


def _positive_temperatures(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values or len(set(values)) != len(values) or min(values) <= 0:
        raise ValueError(f"temperatures must be distinct and greater than 0, got {list(values)}")
    return values


class TargetsConfig(ConfigModel):
    """What is kept for each position; part of a cache's identity."""

    top_k: int = Field(64, ge=1, description="log-probabilities kept for each position")
    temperatures: Annotated[tuple[float, ...], AfterValidator(_positive_temperatures)] = Field(
        (4.0, 2.0, 1.0), description="temperatures that students can train at, each with its log_z and log_tail"
    )
    hidden_bytes: int = Field(
        128, ge=0, description="bytes for each position's projected final hidden state; 0 keeps none"
    )
    num_samples: int = Field(
        0, ge=0, le=2**15 - 1, description="ids drawn from the teacher at each position, for training at temperature 1"
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="inner layers whose input is kept too, projected; layer 0's input is the embedding"
    )
    layer_bytes: int = Field(64, ge=1, description="bytes for each position's projected state of an inner layer")
    heads: dict[Annotated[int, Field(ge=0)], tuple[Annotated[int, Field(ge=0)], ...]] = Field(
        default_factory=dict, description="layer -> query heads whose queries and keys are kept, for the attention loss"
    )

    @model_validator(mode="after")
    def _layers_ride_with_the_projection(self) -> "TargetsConfig":
        if (self.layers or self.heads) and not self.hidden_bytes:
            raise ValueError("layers and heads are kept beside the fitted projection: they need hidden_bytes above 0")
        if len(set(self.layers)) != len(self.layers) or any(
            len(set(h)) != len(h) or not h for h in self.heads.values()
        ):
            raise ValueError("layers and heads must name each layer and head once")
        return self


class ColumnsConfig(ConfigModel):
    """Names of the input columns, for data whose names are not among the usual ones."""

    prompt: str | None = None
    input: str | None = None
    response: str | None = None
    messages: str | None = None
    text: str | None = None


class GenerateConfig(ConfigModel):
    """How the teacher answers the prompts itself. The answers of the data, if it has any, are kept as metadata."""

    temperature: float = Field(1.0, ge=0, description="of the draws; 0 takes the likeliest token each time")
    top_p: float = Field(1.0, gt=0, le=1, description="draws are from the likeliest tokens that hold this mass")
    num: int = Field(1, ge=1, description="answers to each prompt")
    max_tokens: int = Field(512, ge=1, description="tokens of an answer; max_length bounds prompt and answer together")
    thinking: bool = Field(False, description="lets a teacher that can reason before it answers do so")

    @model_validator(mode="after")
    def _several_answers_differ(self) -> "GenerateConfig":
        if self.num > 1 and self.temperature == 0:
            raise ValueError("at temperature 0 all answers to a prompt are the same: num must be 1")
        return self


class SamplesConfig(ConfigModel):
    """Held-out prompts that the teacher answers once, greedily, to stand beside students' answers."""

    num: int = Field(4, ge=0, description="prompts of each domain; 0: none")
    max_tokens: int = Field(128, ge=1, description="tokens of an answer")


class CardConfig(ConfigModel):
    """What the cache's README says of licences, beside what is known anyway."""

    license: str | None = Field(None, description="of the cache itself, as a hub names it: mit, cc-by-4.0")
    teacher_license: str | None = Field(None, description="default: what the teacher's own README states")
    data_license: str | None = Field(None, description="of the data that went in")
    notes: str | None = Field(None, description="a paragraph for those who use the cache")


class CacheConfig(ConfigModel):
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
    generate: GenerateConfig | None = Field(None, description="the teacher answers the prompts itself")
    samples: SamplesConfig = SamplesConfig()
    max_length: int = Field(2048, ge=2, description="tokens in a sequence")
    overlong: Overlong = Field("truncate", description="what becomes of a longer row")
    unit_rows: int = Field(1024, ge=1, description="input rows in a unit; a crash costs one unit")
    calibration_tokens: int | None = Field(
        None, ge=1, description="tokens that fit the projection; default: 16 for each hidden dimension"
    )
    seed: int = Field(42, description="draws the calibration rows and generated answers")
    projection_from: str | None = Field(
        None, description="a cache of the same identity whose projection this one takes, so that both train together"
    )
    card: CardConfig = CardConfig()
    stall_seconds: float = Field(240, gt=0, description="after which an engine without a sign of life is given up")
    trust_remote_code: bool = Field(False, description="run code that the teacher's folder brings; recorded")


class LoraConfig(ConfigModel):
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


class TrainConfig(ConfigModel):
    """Everything that ``distill train`` needs."""

    cache: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="folder of the cache; or of several, which must be of one identity"
    )
    student: str = Field(description="model folder or hub name")
    student_layers: int | None = Field(None, ge=1, description="keep this many layers of the student")
    layer_choice: Literal["even", "loss"] = Field(
        "even", description="which ones: evenly spaced, or those whose absence harms the loss on cached targets most"
    )
    layer_positions: int = Field(1024, ge=1, description="cached positions on which layer_choice loss measures")
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
    packing: bool = Field(False, description="put short sequences into one row, each attending to itself alone")
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="under torchrun: a whole copy on each device, or a part of it; auto: as memory allows"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="8 bits: smaller moments, paged ones move to the host's memory; needs bitsandbytes"
    )
    quantise: Literal["none", "nf4"] = Field(
        "none", description="nf4: the frozen base in 4 bits under LoRA (QLoRA); needs bitsandbytes"
    )
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    seed: int = 42
    shard_window: int = Field(4, ge=1, description="shards whose rows are shuffled together and held in memory")
    wandb: bool = False
    tensorboard: bool = Field(False, description="also write event files into RUN/stage<N>/tensorboard")
    samples: int = Field(
        2, ge=0, description="prompts of each domain that the student answers at each evaluation, for people to read"
    )
    sample_tokens: int = Field(64, ge=1, description="tokens of such an answer")
    allow_incomplete: bool = Field(False, description="train on the committed units of an unsealed cache")
    trust_remote_code: bool = False
    stages: dict[int, dict[str, Any]] = Field(
        default_factory=dict, description="stage number -> keys of StageConfig that differ from its defaults"
    )

    @property
    def caches(self) -> tuple[str, ...]:
        """The folders of all caches."""
        return (self.cache,) if isinstance(self.cache, str) else self.cache

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
        defaults = stage_defaults(self.general, self.domain)[number]
        given = dict(self.stages.get(number, {}))
        if isinstance(given.get("weights"), dict):
            given["weights"] = {**defaults["weights"], **given["weights"]}
        return StageConfig.model_validate({**defaults, **given})


class JobConfig(ConfigModel):
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
    if detail["type"] in ("literal_error", "enum"):
        message += f", got '{detail['input']}'"
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
    return f" (did you mean '{close[0]}'?)" if close else f" (known keys: {', '.join(known)})"
