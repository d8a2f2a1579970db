"""A cache folder flows in, what it holds and how good it is flows out, with one row told token by token."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.cache import storage
from distill.cache.plan import Commit
from distill.cache.reader import CacheReader
from distill.cache.sizes import column_bytes
from distill.errors import CorruptionError, UsageError
from distill.records import SequenceTargets, Split
from distill.report.extras import open_tokenizer
from distill.report.fidelity import TemperatureFidelity, measure

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MASS_UNITS = 16  # units read for the mean mass inside the top-k
_ALTERNATIVES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainCount:
    """How much there is of one split of one domain."""

    domain: str
    split: Split
    num_rows: int
    num_targets: int
    num_trained: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """One target: what stood there, what came next, and what the teacher thought would."""

    token: str
    next_token: str
    trained: bool
    entropy: float  # nats
    alternatives: tuple[tuple[str, float], ...]  # token, probability at T=1


@dataclass(frozen=True, slots=True, kw_only=True)
class RowView:
    """One sequence for a person."""

    row: int
    unit: str
    domain: str
    split: Split
    source: str
    metadata: dict[str, str]
    prompt: str
    response: str
    positions: tuple[Position, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport:
    """What a cache holds. Masses and errors are means over positions."""

    path: str
    sealed: bool
    num_units: int
    num_committed: int
    identity: dict[str, Any]
    recorded: dict[str, Any]
    counts: tuple[DomainCount, ...]
    num_rejects: int
    bytes_per_token: dict[str, float]  # column -> compressed bytes for each target
    topk_mass: dict[float, float]  # temperature -> the teacher's mass inside the top-k
    num_mass_targets: int
    explained: float | None  # share of the logit variance that the projection keeps
    fidelity: tuple[TemperatureFidelity, ...]
    num_fidelity_positions: int
    row: RowView | None  # None where nothing is committed

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def inspect(path: str | Path, row: int = 0) -> InspectReport:
    """What the cache at ``path`` holds, sealed or not, and its ``row``-th sequence in words.

    Raises DataError when there is no cache, UsageError when it has no such row, CorruptionError when what is read of it
    is damaged.
    """
    reader = CacheReader.open(path, allow_incomplete=True)
    topk_mass, num_mass_targets = _topk_mass(reader)
    num_fidelity_positions, fidelity = measure(reader)
    projection = reader.projection if reader.commits else None
    return InspectReport(
        path=str(reader.root),
        sealed=reader.sealed,
        num_units=reader.num_units,
        num_committed=len(reader.commits),
        identity=reader.identity.model_dump(mode="json"),
        recorded=reader.recorded.model_dump(mode="json"),
        counts=_counts(reader),
        num_rejects=sum(commit.num_rejects for commit in reader.commits),
        bytes_per_token=_bytes_per_token(reader),
        topk_mass=topk_mass,
        num_mass_targets=num_mass_targets,
        explained=projection.explained if projection else None,
        fidelity=fidelity,
        num_fidelity_positions=num_fidelity_positions,
        row=_row_view(reader, row) if reader.commits else None,
    )


def _counts(reader: CacheReader) -> tuple[DomainCount, ...]:
    splits: tuple[Split, ...] = ("train", "eval")
    return tuple(
        DomainCount(
            domain=domain,
            split=split,
            num_rows=sum(commit.num_rows[split] for commit in reader.units(domain)),
            num_targets=sum(commit.num_targets[split] for commit in reader.units(domain)),
            num_trained=sum(commit.num_trained[split] for commit in reader.units(domain)),
        )
        for domain in reader.domains
        for split in splits
    )


def _bytes_per_token(reader: CacheReader) -> dict[str, float]:
    """From the footers alone; what belongs to no column is "footers"."""
    sizes: dict[str, int] = {}
    for commit in reader.commits:
        path = storage.inside(reader.root, commit.shard)
        try:
            columns = column_bytes(pq.read_metadata(path))
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise CorruptionError(
                f"unit {commit.unit}: {path} cannot be read: {error}. Run `distill verify {reader.root}` for a list of "
                "all that is wrong."
            ) from error
        for name, size in columns.items():
            sizes[name] = sizes.get(name, 0) + size
    sizes["footers"] = sum(commit.num_bytes for commit in reader.commits) - sum(sizes.values())
    num_targets = sum(commit.num_targets.total for commit in reader.commits)
    return {name: size / num_targets for name, size in sizes.items()} if num_targets else {}


def _topk_mass(reader: CacheReader) -> tuple[dict[float, float], int]:
    """From ``log_tail`` of a few units, spread evenly over the cache."""
    commits = [commit for commit in reader.commits if commit.num_targets.total]
    picked = (
        [commits[i] for i in np.unique(np.linspace(0, len(commits) - 1, _MASS_UNITS).astype(int))] if commits else []
    )
    num_temperatures = len(reader.temperatures)
    tails = [
        batch.column(0).values.to_numpy().reshape(-1, num_temperatures)
        for commit in picked
        for batch in reader.read_unit(commit, columns=["log_tail"]).to_batches()
    ]
    if not tails:
        return {}, 0
    log_tail_NT = np.concatenate(tails).astype(np.float64)
    masses = 1 - np.exp(log_tail_NT).mean(axis=0)
    return {T: float(mass) for T, mass in zip(reader.temperatures, masses, strict=True)}, len(log_tail_NT)


def _row_view(reader: CacheReader, row: int) -> RowView:
    commit, split, index = _locate(reader, row)
    sequence = reader.sequences(commit, split)[index]
    prompt = sequence.prompt
    return RowView(
        row=row,
        unit=commit.unit,
        domain=prompt.domain,
        split=split,
        source=prompt.source,
        metadata=prompt.metadata,
        prompt=prompt.prompt,
        response=prompt.response,
        positions=_positions(sequence, open_tokenizer(reader)),
    )


def _locate(reader: CacheReader, row: int) -> tuple[Commit, Split, int]:
    """Rows are counted through the units in order, train rows of a unit first."""
    rest = row
    for commit in reader.commits:
        if 0 <= rest < commit.num_rows.total:
            is_train = rest < commit.num_rows.train
            return commit, "train" if is_train else "eval", rest if is_train else rest - commit.num_rows.train
        rest -= commit.num_rows.total
    raise UsageError(
        f"{reader.root} has no row {row}: its rows are 0 to {reader.num_rows() - 1}. Choose one with --row."
    )


def _positions(sequence: SequenceTargets, tokenizer: "Tokenizer | None") -> tuple[Position, ...]:
    def text(token_id: int) -> str:
        return tokenizer.decode([token_id], skip_special_tokens=False) if tokenizer else str(token_id)

    prompt, targets = sequence.prompt, sequence.targets
    probabilities = np.exp(targets.topk_logprobs[:, :_ALTERNATIVES].astype(np.float64))
    return tuple(
        Position(
            token=text(int(prompt.input_ids[t])),
            next_token=text(int(prompt.input_ids[t + 1])),
            trained=bool(prompt.loss_mask[t]),
            entropy=float(targets.entropy[t]),
            alternatives=tuple(
                (text(int(token_id)), float(probability))
                for token_id, probability in zip(targets.topk_ids[t], probabilities[t], strict=False)
            ),
        )
        for t in range(prompt.num_targets)
    )
