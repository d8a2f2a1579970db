"""What a cache says about itself: identity, provenance, plan, commit records and manifest flow between JSON and models.

    plan.json  (identity, sources, units)  ->  commits/<unit>.json  (one for each shard)  ->  manifest.json  (all of it)
                                               repairs/<number>.json  (units to be made again)

``schemas/`` holds the JSON Schema of each, pinned to these models by a test. A cache may have a hundred thousand units:
what comes once for each is a slotted dataclass, which takes a sixth of a model's memory.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from distill.records import Split

FORMAT = "distill-cache"
SCHEMA_VERSION = 1
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
UnitName = Annotated[str, Field(pattern=r"^[0-9]{5,}$")]
_STRICT = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


class _Model(BaseModel):
    model_config = ConfigDict(**_STRICT, frozen=True)


def _optional(default: Any, description: str, **bounds: Any) -> Any:
    return Field(default, description=description, exclude_if=lambda value: not value, **bounds)


class Heads(_Model):
    """Attention heads of one layer whose queries and keys are kept."""

    layer: int = Field(ge=0)
    heads: tuple[int, ...] = Field(min_length=1, description="query heads, rising")
    kv_heads: tuple[int, ...] = Field(min_length=1, description="key heads that they attend with, each once, rising")
    head_dim: int = Field(ge=1)


class Generation(_Model):
    """How the teacher wrote its own answers."""

    temperature: float = Field(ge=0, description="0: always the likeliest token")
    top_p: float = Field(gt=0, le=1)
    num: int = Field(ge=1, description="answers to each prompt")
    max_tokens: int = Field(ge=1)
    thinking: bool
    seed: int


class Identity(_Model):
    """What must be equal for two runs to fill one cache, and for a student to learn from it."""

    teacher_weights: str = Field(description="content hash of the teacher's weight files, or the hub's commit")
    token_map: str = Field(description="hash of the token -> id map")
    chat_template: str = Field(description="hash of the chat template")
    vocab_size: int = Field(ge=2, description="real vocabulary; padded rows of the head are left out")
    mask_policy: str = Field(description="which targets train")
    overlong: Literal["truncate", "reject", "split"] = Field(description="what becomes of a longer row")
    max_length: int = Field(ge=2, description="tokens in a sequence")
    dtype: str = Field(description="weights and activations of the teacher")
    quantisation: str | None = Field(description="the teacher's quantisation method, if any")
    head_dtype: str = Field(description="precision of the logits in capture")
    top_k: int = Field(ge=1, description="log-probabilities kept for each position")
    temperatures: tuple[float, ...] = Field(min_length=1, description="order of log_z and log_tail")
    hidden_bytes: int = Field(ge=0, description="bytes for each position's projected hidden state; 0 keeps none")
    trust_remote_code: bool = Field(description="whether code of the teacher's folder ran")
    # Absent where nothing was asked for, as in caches that were written before these could be.
    num_samples: int = _optional(0, "ids drawn at each position at temperature 1", ge=0, le=2**15 - 1)
    layers: tuple[Annotated[int, Field(ge=0)], ...] = _optional((), "inner layers kept, by their input")
    layer_bytes: int = _optional(0, "bytes for each position's projected state of an inner layer", ge=0)
    heads: tuple[Heads, ...] = _optional((), "attention heads whose queries and keys are kept")
    generation: Generation | None = _optional(
        None, "how the teacher wrote its answers; absent: they come with the data"
    )
    schema_version: Literal[1] = 1

    @property
    def gives_more_rows(self) -> bool:
        """Whether an input row may become several sequences: pieces of an over-long one, several answers."""
        return self.overlong == "split" or (self.generation is not None and self.generation.num > 1)

    @model_validator(mode="after")
    def _leaves_a_tail(self) -> "Identity":
        if self.top_k >= self.vocab_size:
            raise ValueError(f"top_k {self.top_k} must be smaller than the vocabulary of {self.vocab_size}")
        return self


class Recorded(_Model):
    """How the cache was made. Kept for people; nothing compares it."""

    teacher: str = Field(description="model folder or hub name")
    revision: str | None = None
    engine: str
    engine_version: str
    versions: dict[str, str] = Field(default_factory=dict, description="package -> version")
    machine: str = ""
    command: str = ""
    kv_cache_dtype: str | None = None
    created: str = Field("", description="ISO 8601, UTC")
    card: dict[str, str] = _optional({}, "for the README: license, teacher_license, data_license, notes")


class Source(_Model):
    """One input file or data set."""

    domain: str = Field(min_length=1)
    path: str
    sha256: str = Field(description="hash of the file's content, or a data set's fingerprint")
    num_rows: int = Field(ge=0)
    split: Split | None = Field(None, description="null: a hash of each row decides")
    columns: dict[str, str] = _optional({}, "columns that the user named: response -> its name")


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Unit:
    """A slice of one source: input rows ``start`` to ``stop``, the latter not included."""

    unit: Annotated[str, Field(pattern=r"^[0-9]{5,}$")]
    source: Annotated[int, Field(ge=0, description="index into sources")]
    domain: str
    split: Split | None
    start: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(ge=1)]

    @property
    def num_input_rows(self) -> int:
        """Input rows that must come back as sequences or rejects."""
        return self.stop - self.start


class Plan(_Model):
    """``plan.json``: written once, before anything else."""

    format: Literal["distill-cache"] = "distill-cache"
    schema_version: Literal[1] = 1
    identity: Identity
    recorded: Recorded
    sources: tuple[Source, ...]
    eval_fraction: float = Field(ge=0, lt=1)
    units: tuple[Unit, ...]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Counts:
    """A number for each split."""

    train: Annotated[int, Field(ge=0)] = 0
    eval: Annotated[int, Field(ge=0)] = 0

    def __getitem__(self, split: Split) -> int:
        return self.train if split == "train" else self.eval

    @property
    def total(self) -> int:
        """Both splits together."""
        return self.train + self.eval


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Commit:
    """``commits/<unit>.json``: makes one shard visible."""

    format: Literal["distill-cache"] = "distill-cache"
    schema_version: Literal[1] = 1
    unit: Annotated[str, Field(pattern=r"^[0-9]{5,}$")]
    domain: str
    generation: Annotated[int, Field(ge=1, description="above 1: made for the repair of that number")] = 1
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$", description="names the writer's files")]
    shard: Annotated[str, Field(description="path below the cache's folder")]
    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=1, description="size of the shard")]
    num_decoded_bytes: Annotated[int, Field(ge=0, description="size of the shard's columns in memory")]
    num_rows: Counts
    num_targets: Counts
    num_trained: Annotated[Counts, Field(description="targets that the loss mask keeps")]
    num_input_rows: Annotated[int, Field(ge=0)]
    num_rejects: Annotated[int, Field(ge=0)]
    rejects: Annotated[str | None, Field(description="path below the cache's folder; null: none")]
    rejects_sha256: Sha256 | None
    projection_sha256: Annotated[Sha256 | None, Field(description="null: the cache keeps no hidden states")]


class Repair(_Model):
    """``repairs/<generation>.json``: asks for units, and the manifest, to be made again."""

    format: Literal["distill-cache"] = "distill-cache"
    schema_version: Literal[1] = 1
    generation: int = Field(ge=2, description="of the commits and the manifest that answer it")
    units: dict[UnitName, str] = Field(description="unit -> what is wrong with it")


class Totals(_Model):
    """Sums over all commits."""

    num_rows: Counts
    num_targets: Counts
    num_trained: Counts
    num_input_rows: int
    num_rejects: int
    num_bytes: int


class Manifest(_Model):
    """``manifest.json``: written once, when every unit is committed. A sealed cache is read through it alone."""

    format: Literal["distill-cache"] = "distill-cache"
    schema_version: Literal[1] = 1
    identity: Identity
    recorded: Recorded
    sources: tuple[Source, ...]
    eval_fraction: float
    projection_sha256: Sha256 | None
    files: dict[str, Sha256] = Field(description="other files of the cache -> SHA-256")
    commits: tuple[Commit, ...]
    totals: Totals


def plan_units(sources: Sequence[Source], unit_rows: int) -> list[Unit]:
    """Slices of at most ``unit_rows`` input rows, source by source, numbered in order."""
    slices = [
        (index, start, min(start + unit_rows, source.num_rows))
        for index, source in enumerate(sources)
        for start in range(0, source.num_rows, unit_rows)
    ]
    digits = max(5, len(str(len(slices) - 1)))
    return [
        Unit(
            unit=f"{number:0{digits}d}",
            source=index,
            domain=sources[index].domain,
            split=sources[index].split,
            start=start,
            stop=stop,
        )
        for number, (index, start, stop) in enumerate(slices)
    ]


def total(commits: Sequence[Commit]) -> Totals:
    """Sums over ``commits``."""
    return Totals(
        num_rows=_sum([commit.num_rows for commit in commits]),
        num_targets=_sum([commit.num_targets for commit in commits]),
        num_trained=_sum([commit.num_trained for commit in commits]),
        num_input_rows=sum(commit.num_input_rows for commit in commits),
        num_rejects=sum(commit.num_rejects for commit in commits),
        num_bytes=sum(commit.num_bytes for commit in commits),
    )


def _sum(counts: Sequence[Counts]) -> Counts:
    return Counts(train=sum(count.train for count in counts), eval=sum(count.eval for count in counts))
