"""``SequenceTargets`` flow in, rounded Arrow tables flow out; and back, as views wherever Arrow allows it.

Rounding spares bytes where the teacher's own precision ends: topk_logprobs to multiples of 2⁻⁹, log_z to 2⁻¹⁴ (an error
in it moves every cached probability of the position), log_tail and entropy to 2⁻¹⁰.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill.cache.schema import Layout, row_schema, values_per_row
from distill.errors import CorruptionError
from distill.records import Prompt, SequenceTargets, Targets

ROUNDING = {"topk_logprobs": 9, "log_z": 14, "log_tail": 10, "entropy": 10}  # bits after the point
SAMPLED = ("sampled_ids", "sampled_counts")
_TEXTS = ("sequence_id", "prompt_id", "domain", "split", "source", "metadata", "prompt", "response")


def encode(rows: Sequence[SequenceTargets], layout: Layout) -> pa.Table:
    """Rows as a table of ``row_schema(layout)``. They must have passed ``sanity.problem``."""
    schema = row_schema(layout)
    columns = []
    for field in schema:
        if field.name in _TEXTS:
            columns.append(_text_column(rows, field))
            continue
        arrays = [_array(row, field.name) for row in rows]
        flat = np.concatenate([array.reshape(-1) for array in arrays])
        if field.name in ROUNDING:
            flat = rounded(flat, ROUNDING[field.name])
        offsets = np.cumsum([0, *(array.size for array in arrays)]).astype(np.int32)
        values = pa.array(flat, field.type.value_type)
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), values, type=field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _text_column(rows: Sequence[SequenceTargets], field: pa.Field) -> pa.Array:
    if field.name == "metadata":
        return pa.array([list(row.prompt.metadata.items()) for row in rows], field.type)
    values = pa.array([getattr(row.prompt, field.name) for row in rows], pa.string())
    return values.dictionary_encode() if pa.types.is_dictionary(field.type) else values


def _array(row: SequenceTargets, name: str) -> NDArray[Any]:
    if name.startswith("hidden_"):
        return row.targets.hidden[int(name.removeprefix("hidden_"))]
    if name.startswith("layer"):
        return row.targets.layers[name]
    owner = row.prompt if name in ("input_ids", "loss_mask") else row.targets
    values: NDArray[Any] = getattr(owner, name)
    return values


def rounded(values: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """The nearest multiples of 2^-bits as float32."""
    scale = np.float32(2**bits)
    nearest: NDArray[np.float32] = np.rint(np.asarray(values, np.float32) * scale)
    nearest /= scale
    nearest += np.float32(0)  # -0.0 becomes 0.0
    return nearest


def decode(table: pa.Table, layout: Layout) -> list[SequenceTargets]:
    """The rows of a table that has all columns. Numeric arrays are read-only views of it, except loss_mask.

    Raises CorruptionError when a list does not have the length that the row's tokens call for.
    """
    return [row for batch in table.to_batches() for row in _decode_batch(batch, layout)]


def _decode_batch(batch: pa.RecordBatch, layout: Layout) -> Iterator[SequenceTargets]:
    texts = {name: batch.column(name).to_pylist() for name in _TEXTS}
    num_targets = np.diff(batch.column("input_ids").offsets.to_numpy()) - 1
    views = {
        name: row_views(batch.column(name), lengths=num_targets * per_target + extra, name=name)
        for name, (per_target, extra) in values_per_row(layout).items()
    }
    sampled = _sampled_views(batch, layout, num_targets) if layout.num_samples else None
    for i in range(batch.num_rows):
        prompt = Prompt(
            **{name: texts[name][i] for name in _TEXTS if name != "metadata"},
            metadata=dict(texts["metadata"][i]),
            input_ids=views["input_ids"][i],
            loss_mask=views["loss_mask"][i],
        )
        shape = (int(num_targets[i]), -1)
        targets = Targets(
            topk_ids=views["topk_ids"][i].reshape(shape),
            topk_logprobs=views["topk_logprobs"][i].reshape(shape),
            log_z=views["log_z"][i].reshape(shape),
            log_tail=views["log_tail"][i].reshape(shape),
            hidden={bits: views[f"hidden_{bits}"][i].reshape(shape) for bits, _ in layout.widths},
            entropy=views["entropy"][i],
            sampled_ids=None if sampled is None else sampled[0][i],
            sampled_counts=None if sampled is None else sampled[1][i],
            layers={name: views[name][i].reshape(shape) for name, _ in layout.layer_columns},
        )
        yield SequenceTargets(prompt=prompt, targets=targets)


def _sampled_views(
    batch: pa.RecordBatch, layout: Layout, num_targets: NDArray[np.int64]
) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Ids and counts of each row, after the counts of each row proved to be those of its positions."""
    lengths = np.diff(batch.column("sampled_counts").offsets.to_numpy())
    ids, counts = (row_views(batch.column(name), lengths=lengths, name=name) for name in SAMPLED)
    for row_counts, num in zip(counts, num_targets, strict=True):
        if len(sampled_starts(row_counts, layout.num_samples)) != num:
            raise CorruptionError("column sampled_counts does not have the draws that the rows' tokens call for.")
    return ids, counts


def counted(drawn_NS: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int16]]:
    """Unique ids and counts, position by position, an id that came more often first: ``sampled_ids`` and counts."""
    sorted_NS = np.sort(drawn_NS, axis=1)
    is_first_NS = np.ones(sorted_NS.shape, bool)
    is_first_NS[:, 1:] = sorted_NS[:, 1:] != sorted_NS[:, :-1]
    starts = np.flatnonzero(is_first_NS)
    counts = np.diff(starts, append=sorted_NS.size)
    position = starts // sorted_NS.shape[1]
    order = np.lexsort((starts, -counts, position))
    return sorted_NS.reshape(-1)[starts][order].astype(np.int32), counts[order].astype(np.int16)


def sampled_starts(counts: NDArray[np.int16], num_samples: int) -> NDArray[np.int64]:
    """Where each position's ids begin in ``sampled_ids``: [L-1], or nothing where counts and draws do not fit.

    A position ends where the counts so far are a multiple of ``num_samples``.
    """
    ends = np.flatnonzero(np.cumsum(counts, dtype=np.int64) % num_samples == 0)
    starts: NDArray[np.int64] = np.concatenate([[0], ends + 1])[:-1]
    whole = len(ends) > 0 and ends[-1] == len(counts) - 1 and counts.min() > 0
    if not whole or not np.array_equal(
        np.add.reduceat(counts.astype(np.int64), starts), np.full(len(starts), num_samples)
    ):
        return np.zeros(0, np.int64)
    return starts


def row_views(column: pa.ListArray, *, lengths: NDArray[np.int64], name: str) -> list[NDArray[Any]]:
    """One numpy array for each row of a list column: views, except of booleans, which Arrow packs to bits."""
    offsets = column.offsets.to_numpy()
    if not np.array_equal(np.diff(offsets), lengths) or (len(lengths) and lengths.min() < 1):
        raise CorruptionError(f"column {name} does not have the values that the rows' tokens call for.")
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in itertools.pairwise(offsets.tolist())]
