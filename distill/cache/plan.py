"""What a cache says about itself: identity, provenance, plan, commit records and manifest flow between JSON and models.

    plan.json  (identity, sources, units)  ->  commits/<unit>.json  (one for each shard)  ->  manifest.json  (all of it)
                                               repairs/<number>.json  (units to be made again)

``schemas/`` holds the JSON Schema of each, pinned to these models by a test.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill.records import Split

FORMAT = "distill-cache"
SCHEMA_VERSION = 1
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
UnitName = Annotated[str, Field(pattern=r"^[0-9]{5,}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_serialization_defaults_required=True)


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
    schema_version: Literal[1] = 1

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


class Source(_Model):
    """One input file or data set."""

    domain: str = Field(min_length=1)
    path: str
    sha256: str = Field(description="hash of the file's content, or a data set's fingerprint")
    num_rows: int = Field(ge=0)
    split: Split | None = Field(None, description="null: a hash of each row decides")


class Unit(_Model):
    """A slice of one source: input rows ``start`` to ``stop``, the latter not included."""

    unit: str = Field(pattern=r"^[0-9]{5,}$")
    source: int = Field(ge=0, description="index into sources")
    domain: str
    split: Split | None
    start: int = Field(ge=0)
    stop: int = Field(ge=1)

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


class Counts(_Model):
    """A number for each split."""

    train: int = Field(0, ge=0)
    eval: int = Field(0, ge=0)

    def __getitem__(self, split: Split) -> int:
        return self.train if split == "train" else self.eval

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(train=self.train + other.train, eval=self.eval + other.eval)

    @property
    def total(self) -> int:
        """Both splits together."""
        return self.train + self.eval


class Commit(_Model):
    """``commits/<unit>.json``: makes one shard visible."""

    format: Literal["distill-cache"] = "distill-cache"
    schema_version: Literal[1] = 1
    unit: str = Field(pattern=r"^[0-9]{5,}$")
    domain: str
    generation: int = Field(1, ge=1, description="above 1: made for the repair of that number")
    nonce: str = Field(pattern=r"^[0-9a-f]{16}$", description="names the writer's files")
    shard: str = Field(description="path below the cache's folder")
    sha256: Sha256
    num_bytes: int = Field(ge=1, description="size of the shard")
    num_decoded_bytes: int = Field(ge=0, description="size of the shard's columns in memory")
    num_rows: Counts
    num_targets: Counts
    num_trained: Counts = Field(description="targets that the loss mask keeps")
    num_input_rows: int = Field(ge=0)
    num_rejects: int = Field(ge=0)
    rejects: str | None = Field(description="path below the cache's folder; null: none")
    rejects_sha256: Sha256 | None
    projection_sha256: Sha256 | None = Field(description="null: the cache keeps no hidden states")


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
        num_rows=sum((commit.num_rows for commit in commits), Counts()),
        num_targets=sum((commit.num_targets for commit in commits), Counts()),
        num_trained=sum((commit.num_trained for commit in commits), Counts()),
        num_input_rows=sum(commit.num_input_rows for commit in commits),
        num_rejects=sum(commit.num_rejects for commit in commits),
        num_bytes=sum(commit.num_bytes for commit in commits),
    )
