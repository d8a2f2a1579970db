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


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The numbers that give a row's lists their shape."""

    top_k: int
    temperatures: tuple[float, ...]
    widths: tuple[tuple[int, int], ...]  # (bits, coordinates), bits downwards; empty: no hidden states

    @staticmethod
    def of(identity: Identity, widths: tuple[tuple[int, int], ...]) -> "Layout":
        """The layout of a cache: its identity, and the widths of its projection."""
        return Layout(top_k=identity.top_k, temperatures=identity.temperatures, widths=widths)


def row_schema(layout: Layout) -> pa.Schema:
    """The columns of a shard, in order. Nothing is ever null."""
    names = pa.dictionary(pa.int32(), pa.string())
    metadata = pa.map_(pa.string(), pa.field("value", pa.string(), nullable=False))
    columns: list[tuple[str, pa.DataType]] = [
        ("sequence_id", pa.string()),
        ("prompt_id", pa.string()),
        ("domain", names),
        ("split", names),
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
        ("entropy", list_of(pa.float32())),
    ]
    about = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "top_k": layout.top_k,
        "temperatures": list(layout.temperatures),
        "widths": [list(pair) for pair in layout.widths],
    }
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in columns], metadata={METADATA_KEY: json.dumps(about)}
    )


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
    )


def parquet_options(layout: Layout) -> dict[str, Any]:
    """Options of ``pyarrow.parquet``. They name the leaves: an option for a list's own name is silently ignored."""
    return {
        "compression": "zstd",
        "compression_level": 3,
        "write_page_checksum": True,
        "use_dictionary": ["domain", "split", *(f"hidden_{bits}.list.element" for bits, _ in layout.widths)],
        "use_byte_stream_split": [f"{name}.list.element" for name in ("topk_logprobs", "log_z", "log_tail", "entropy")],
        "write_statistics": ["domain", "split", "source"],
    }


def values_per_row(layout: Layout) -> dict[str, tuple[int, int]]:
    """List column -> (values for each target, values for each row beside them)."""
    return {
        "input_ids": (1, 1),
        "loss_mask": (1, 0),
        "topk_ids": (layout.top_k, 0),
        "topk_logprobs": (layout.top_k, 0),
        "log_z": (len(layout.temperatures), 0),
        "log_tail": (len(layout.temperatures), 0),
        **{f"hidden_{bits}": (count, 0) for bits, count in layout.widths},
        "entropy": (1, 0),
    }
