"""What ``distill plan`` answers: everything in it is counted, measured, or an estimate that says so.

``schemas/commands/plan.json`` is the JSON Schema of ``PlanReport``, pinned to it by a test.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from distill.records import Split
from distill.teacher.measure import Measured


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_Model):
    """A 95% confidence interval."""

    low: float
    high: float


class SplitCount(_Model):
    """How much there is of one split of one domain."""

    domain: str
    split: Split
    num_rows: int = Field(description="sequences")
    num_tokens: int
    num_targets: int = Field(description="tokens but the first of each sequence")
    num_trained: int = Field(description="targets that the loss mask keeps")


class RejectCount(_Model):
    """Input rows of a domain that become no sequence."""

    domain: str
    reason: str = Field(description="numbers in it stand as N")
    num_rows: int


class Counts(_Model):
    """What the data holds."""

    num_input_rows: int
    num_read: int = Field(description="input rows that were tokenised; fewer than all with --sample")
    num_units: int = Field(description="units, each of which becomes one shard")
    splits: tuple[SplitCount, ...]
    num_targets: int
    num_trained: int
    targets_interval: Interval | None = Field(description="of num_targets; null: every row was read")
    rejects: tuple[RejectCount, ...]
    num_to_answer: int = Field(description="sequences whose answers the teacher writes; counted at their longest")


class Storage(_Model):
    """What the cache takes on disk."""

    columns: dict[str, int] = Field(description="column -> bytes; footers: what belongs to none")
    shards: int = Field(description="bytes of all shards")
    shards_interval: Interval | None = Field(description="by the number of targets alone; null: every row was read")
    projection: int = Field(description="bytes of projection.safetensors")
    fidelity: int = Field(description="bytes of fidelity.safetensors, at most")
    bytes_per_target: float = Field(description="shards, for each target")
    source: Literal["typical", "measured"] = Field(description="where the teacher's columns have their sizes from")


class Weights(_Model):
    """The teacher's weights in one precision."""

    dtype: str
    num_bytes: int
    tensor_parallel_size: int | None = Field(description="fewest GPUs that hold it; null: no --gpu-memory, or too many")


class Memory(_Model):
    """What capture needs beside the disk."""

    num_parameters: int
    num_active_parameters: int = Field(description="of the layers, that one token passes through")
    weights: tuple[Weights, ...]
    dtype: str = Field(description="the one of weights that the teacher would run in")
    batch_tokens: int = Field(description="tokens in one step of the engine")
    head_rows: int = Field(description="positions whose logits exist at the same time on a GPU")
    head_bytes: int = Field(description="working memory of the LM head, on each GPU")
    activation_bytes: int = Field(description="of one step, roughly")
    kv_tokens: int = Field(description="tokens of the window: one step and the longest sequence; 0: no KV cache")
    kv_bytes: int = Field(description="KV cache of the window")


class Flops(_Model):
    """FLOPs for one target."""

    body: float = Field(description="the layers, attention at the data's mean context included")
    head: float = Field(description="LM head at every position")
    projection: float
    total: float


class Cost(_Model):
    """What the capture takes."""

    num_tokens: int = Field(description="all targets, and those of the calibration pass")
    tokens_per_s: float = Field(description="of all GPUs together")
    source: Literal["given", "derived", "measured"]
    num_gpus: int
    hours: float
    gpu_hours: float
    price: float | None = Field(description="of the whole job, in the unit of --price")


class Proposal(_Model):
    """What to ask for, and why."""

    top_k: int | None
    hidden_bytes: int | None
    bytes_per_target: float | None = Field(description="shards with the proposed top_k and hidden_bytes")
    max_num_batched_tokens: int | None = Field(description="for engine_options; null: no --gpu-memory")
    reasons: tuple[str, ...]


class PlanReport(_Model):
    """A cache before it is made."""

    teacher: str
    engine: str
    vocab_size: int
    top_k: int
    temperatures: tuple[float, ...]
    hidden_bytes: int
    counts: Counts
    storage: Storage
    memory: Memory | None = Field(description="null: a teacher of another build than the decoders that are known")
    flops: Flops | None
    cost: Cost | None = Field(description="null: nothing to derive a rate from")
    measured: Measured | None = Field(description="null: without --measure")
    proposal: Proposal | None
    notes: tuple[str, ...]
