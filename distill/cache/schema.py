"""The targets that a cache holds flow in, the Arrow schema of its rows and the Parquet options flow out.

One row is one sequence of L tokens with L-1 targets. Lists are flat: ``topk_ids`` has (L-1)*k values, position by
position. See docs/format.md and schemas/row.json.
"""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from distill.cache.plan import FORMAT, SCHEMA_VERSION, Identity

METADATA_KEY = b"distill"
_NAMES = pa.dictionary(pa.int32(), pa.string())
_SAMPLED = {"sampled_ids": pa.int32(), "sampled_counts": pa.int16()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The numbers that give a row's lists their shape."""

    top_k: int
    temperatures: tuple[float, ...]
    widths: tuple[tuple[int, int], ...]  # (bits, coordinates), bits downwards; empty: no hidden states
    num_samples: int = 0  # ids drawn at each position; 0: no sampled columns
    layer_columns: tuple[tuple[str, int], ...] = ()  # (layer<i>_…, values for each target)

    @staticmethod
    def of(identity: Identity, widths: tuple[tuple[int, int], ...]) -> "Layout":
        """The layout of a cache: its identity, and the widths of its projection."""
        return Layout(
            top_k=identity.top_k,
            temperatures=identity.temperatures,
            widths=widths,
            num_samples=identity.num_samples,
            layer_columns=layer_columns(identity),
        )


def layer_columns(identity: Identity) -> tuple[tuple[str, int], ...]:
    """Columns of inner layers, and how many values each has for a target: states, then queries and keys."""
    states = [(f"layer{layer}_hidden", identity.layer_bytes) for layer in identity.layers]
    heads = [
        (f"layer{kept.layer}_{name}", count * size)
        for kept in identity.heads
        for side, count in (("q", len(kept.heads)), ("k", len(kept.kv_heads)))
        for name, size in ((side, kept.head_dim), (f"{side}_scale", 1))
    ]
    return (*states, *heads)


def row_schema(layout: Layout) -> pa.Schema:
    """The columns of a shard, in order. Nothing is ever null."""
    metadata = pa.map_(pa.string(), pa.field("value", pa.string(), nullable=False))
    columns: list[tuple[str, pa.DataType]] = [
        ("sequence_id", pa.string()),
        ("prompt_id", pa.string()),
        ("domain", _NAMES),
        ("split", _NAMES),
        ("source", pa.string()),
        ("metadata", metadata),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("input_ids", list_of(pa.int32())),
        ("loss_mask", list_of(pa.bool_())),
        ("topk_ids", list_of(pa.int32())),
        ("topk_logprobs", list_of(pa.float32())),
        ("log_z", list_of(pa.float32())),
        ("log_tail", list_of(pa.float32())),
        *((f"hidden_{bits}", list_of(pa.int8())) for bits, _ in layout.widths),
        *((name, list_of(kind)) for name, kind in _SAMPLED.items() if layout.num_samples),
        *((name, list_of(_layer_kind(name))) for name, _ in layout.layer_columns),
        ("entropy", list_of(pa.float32())),
    ]
    about = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "top_k": layout.top_k,
        "temperatures": list(layout.temperatures),
        "widths": [list(pair) for pair in layout.widths],
        "num_samples": layout.num_samples,
        "layer_columns": [list(pair) for pair in layout.layer_columns],
    }
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in columns], metadata={METADATA_KEY: json.dumps(about)}
    )


def _layer_kind(name: str) -> pa.DataType:
    return pa.float32() if name.endswith("_scale") else pa.int8()


def list_of(kind: pa.DataType) -> pa.DataType:
    """A list whose child has the name that Parquet gives it, so that schemas compare equal after a round trip."""
    return pa.list_(pa.field("element", kind, nullable=False))


def layout_of(schema: pa.Schema) -> Layout | None:
    """The layout that a shard's schema states, or None where it states none."""
    text = (schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        return None
    about = json.loads(text)
    return Layout(
        top_k=int(about["top_k"]),
        temperatures=tuple(float(value) for value in about["temperatures"]),
        widths=tuple((int(bits), int(count)) for bits, count in about["widths"]),
        num_samples=int(about.get("num_samples", 0)),
        layer_columns=tuple((str(name), int(count)) for name, count in about.get("layer_columns", [])),
    )


def parquet_options(layout: Layout) -> dict[str, Any]:
    """Options of ``pyarrow.parquet``. They name the leaves: an option for a list's own name is silently ignored.

    Ids are compressed at zstd level 2: as small as at level 3, and a third faster. Other columns grow by 5% there.
    """
    kinds = {leaf: kind for field in row_schema(layout) for leaf, kind in _leaves(field)}
    return {
        "compression": "zstd",
        "compression_level": {leaf: 2 if kind == pa.int32() else 3 for leaf, kind in kinds.items()},
        "write_page_checksum": True,
        "use_dictionary": [leaf for leaf, kind in kinds.items() if kind in (pa.int8(), pa.int16(), _NAMES)],
        "use_byte_stream_split": [leaf for leaf, kind in kinds.items() if kind == pa.float32()],
        "write_statistics": ["domain", "split", "source"],
    }


def _leaves(field: pa.Field) -> list[tuple[str, pa.DataType]]:
    """Parquet's paths of the columns that hold a field's values."""
    if pa.types.is_list(field.type):
        return [(f"{field.name}.list.element", field.type.value_type)]
    if pa.types.is_map(field.type):
        return [(f"{field.name}.key_value.{part}", pa.string()) for part in ("key", "value")]
    return [(field.name, field.type)]


def values_per_row(layout: Layout) -> dict[str, tuple[int, int]]:
    """List column -> (values for each target, values for each row beside them).

    The sampled columns are not among them: how many different ids a position drew is in their counts.
    """
    return {
        "input_ids": (1, 1),
        "loss_mask": (1, 0),
        "topk_ids": (layout.top_k, 0),
        "topk_logprobs": (layout.top_k, 0),
        "log_z": (len(layout.temperatures), 0),
        "log_tail": (len(layout.temperatures), 0),
        **{f"hidden_{bits}": (count, 0) for bits, count in layout.widths},
        **{name: (count, 0) for name, count in layout.layer_columns},
        "entropy": (1, 0),
    }
