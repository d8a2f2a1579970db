"""What goes into a shard comes out of it, rounded by no more than was promised, in columns that every tool reads."""

import dataclasses
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache.codec import decode, encode, rounded, sampled_starts
from distill.cache.schema import Layout, layout_of, parquet_options, row_schema
from distill.cache.shard import row_groups, write_rows
from distill.errors import CorruptionError
from distill.records import Prompt, SequenceTargets, Targets

LAYOUT = Layout(
    top_k=3,
    temperatures=(2.0, 1.0),
    widths=((8, 2), (4, 1), (2, 5)),
    num_samples=4,
    layer_columns=(("layer3_hidden", 5), ("layer7_q", 6), ("layer7_q_scale", 2)),
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def sequences(draw: Any) -> SequenceTargets:
    """Any row of LAYOUT: the codec does not care whether its numbers make sense."""
    num = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    prompt = Prompt(
        sequence_id=draw(texts),
        prompt_id=draw(texts),
        domain=draw(st.sampled_from(["general", "医学"])),
        split="train",
        source=draw(texts),
        metadata=draw(st.dictionaries(texts, texts, max_size=3)),
        prompt=draw(texts),
        response=draw(texts),
        input_ids=rng.integers(0, 2**31 - 1, num + 1).astype(np.int32),
        loss_mask=rng.random(num) < 0.5,
    )
    counts = [draw(st.sampled_from([[4], [3, 1], [1, 1, 2], [1, 1, 1, 1]])) for _ in range(num)]
    sampled_counts = np.concatenate(counts).astype(np.int16)
    targets = Targets(
        sampled_ids=rng.integers(0, 2**31 - 1, len(sampled_counts)).astype(np.int32),
        sampled_counts=sampled_counts,
        layers={
            name: rng.exponential(1, (num, width)).astype(np.float32)
            if name.endswith("_scale")
            else rng.integers(-128, 128, (num, width)).astype(np.int8)
            for name, width in LAYOUT.layer_columns
        },
        topk_ids=rng.integers(0, 2**31 - 1, (num, 3)).astype(np.int32),
        topk_logprobs=-rng.exponential(5, (num, 3)).astype(np.float32),
        log_z=rng.normal(0, 5, (num, 2)).astype(np.float32),
        log_tail=-rng.exponential(5, (num, 2)).astype(np.float32),
        hidden={
            bits: rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (num, count)).astype(np.int8)
            for bits, count in LAYOUT.widths
        },
        entropy=rng.exponential(2, num).astype(np.float32),
    )
    return SequenceTargets(prompt=prompt, targets=targets)


def through_parquet(rows: list[SequenceTargets]) -> pa.Table:
    file = BytesIO()
    write_rows(file, rows, LAYOUT)
    return pq.ParquetFile(BytesIO(file.getvalue()), page_checksum_verification=True).read()


@settings(max_examples=40, deadline=None)
@given(st.lists(sequences(), max_size=5))
def test_round_trip(rows: list[SequenceTargets]) -> None:
    table = through_parquet(rows)
    assert table.schema.equals(row_schema(LAYOUT))
    assert layout_of(table.schema) == LAYOUT
    read = decode(table, LAYOUT)
    assert len(read) == len(rows)
    for row, copy in zip(rows, read, strict=True):
        for name in ("sequence_id", "prompt_id", "domain", "split", "source", "metadata", "prompt", "response"):
            assert getattr(copy.prompt, name) == getattr(row.prompt, name)
        np.testing.assert_array_equal(copy.prompt.input_ids, row.prompt.input_ids)
        np.testing.assert_array_equal(copy.prompt.loss_mask, row.prompt.loss_mask)
        np.testing.assert_array_equal(copy.targets.topk_ids, row.targets.topk_ids)
        for bits, values in row.targets.hidden.items():
            np.testing.assert_array_equal(copy.targets.hidden[bits], values)
        np.testing.assert_array_equal(copy.targets.sampled_ids, row.targets.sampled_ids)
        np.testing.assert_array_equal(copy.targets.sampled_counts, row.targets.sampled_counts)
        for name, values in row.targets.layers.items():
            np.testing.assert_array_equal(copy.targets.layers[name], values)
        for name, bits in (("topk_logprobs", 9), ("log_z", 14), ("log_tail", 10), ("entropy", 10)):
            original, kept = getattr(row.targets, name), getattr(copy.targets, name)
            assert kept.dtype == np.float32
            assert kept.shape == original.shape
            assert np.abs(kept - original).max() <= 2.0 ** -(bits + 1)
            assert (np.mod(kept * 2**bits, 1) == 0).all()


@pytest.mark.parametrize(
    ("counts", "starts"),
    [([4], [0]), ([1, 3, 2, 2], [0, 2]), ([4, 1, 1, 1, 1, 3, 1], [0, 1, 5]), ([3, 2], []), ([4, 0], []), ([8], [])],
)
def test_counts_tell_where_positions_begin_or_that_they_cannot(counts: list[int], starts: list[int]) -> None:
    assert sampled_starts(np.array(counts, np.int16), 4).tolist() == starts


def test_rounding_to_literal_values() -> None:
    values = np.array([-0.0001, -0.001, -1.0, -3.14159, 0.0], np.float32)
    expected = [0.0, -1 / 512, -1.0, -1608 / 512, 0.0]
    np.testing.assert_array_equal(rounded(values, 9), np.array(expected, np.float32))
    assert not np.signbit(rounded(values, 9)[0])


def test_numeric_arrays_are_views(teacher: Any) -> None:
    layout = Layout(top_k=8, temperatures=(4.0, 2.0, 1.0), widths=teacher.projection.widths)
    table = encode([teacher.sequence(number) for number in range(4)], layout)
    first = decode(table, layout)[1]
    for name in ("topk_ids", "topk_logprobs", "log_z", "log_tail", "entropy"):
        array = getattr(first.targets, name)
        assert not array.flags.owndata
        assert not array.flags.writeable
        column = table.column(name).chunk(0).values.to_numpy()
        assert np.shares_memory(array, column)


def test_options_reach_the_leaves() -> None:
    schema = row_schema(LAYOUT)
    file = BytesIO()
    rows = [_row(number, "train" if number < 3 else "eval") for number in range(5)]
    write_rows(file, rows, LAYOUT)
    footer = pq.ParquetFile(BytesIO(file.getvalue())).metadata
    chunks = {
        footer.row_group(0).column(i).path_in_schema: footer.row_group(0).column(i) for i in range(footer.num_columns)
    }
    options = parquet_options(LAYOUT)
    assert {*options["use_dictionary"], *options["use_byte_stream_split"]} <= set(chunks)
    assert set(options["compression_level"]) == set(chunks)  # a leaf without a level would get zstd's lowest
    for name, chunk in chunks.items():
        assert chunk.compression == "ZSTD"
        assert chunk.has_dictionary_page == (name in options["use_dictionary"]), name
        assert ("BYTE_STREAM_SPLIT" in chunk.encodings) == (name in options["use_byte_stream_split"]), name
    assert {name.split(".")[0] for name in chunks} == set(schema.names)


def _row(number: int, split: str, num: int = 40) -> SequenceTargets:
    rng = np.random.default_rng(number)
    prompt = Prompt(
        sequence_id=str(number),
        prompt_id=str(number),
        domain="general",
        split=split,
        source=f"x:{number}",
        prompt="p",
        response="r",
        input_ids=np.arange(num + 1, dtype=np.int32),
        loss_mask=np.ones(num, bool),
    )
    targets = Targets(
        topk_ids=rng.integers(0, 1000, (num, 3)).astype(np.int32),
        topk_logprobs=np.zeros((num, 3), np.float32),
        log_z=np.zeros((num, 2), np.float32),
        log_tail=np.zeros((num, 2), np.float32),
        hidden={bits: np.zeros((num, count), np.int8) for bits, count in LAYOUT.widths},
        entropy=np.zeros(num, np.float32),
        sampled_ids=np.zeros(num, np.int32),
        sampled_counts=np.full(num, 4, np.int16),
        layers={
            name: np.zeros((num, width), np.float32 if name.endswith("_scale") else np.int8)
            for name, width in LAYOUT.layer_columns
        },
    )
    return SequenceTargets(prompt=prompt, targets=targets)


def test_low_widths_take_few_bytes() -> None:
    layout = dataclasses.replace(LAYOUT, widths=((2, 200),))
    row = _row(0, "train", num=2000)
    hidden = {2: np.random.default_rng(0).integers(-2, 2, (2000, 200)).astype(np.int8)}
    file = BytesIO()
    write_rows(file, [dataclasses.replace(row, targets=dataclasses.replace(row.targets, hidden=hidden))], layout)
    footer = pq.ParquetFile(BytesIO(file.getvalue())).metadata
    sizes = {
        footer.row_group(0).column(i).path_in_schema: footer.row_group(0).column(i).total_compressed_size
        for i in range(footer.num_columns)
    }
    assert sizes["hidden_2.list.element"] * 8 / (2000 * 200) < 2.1


def test_row_groups_never_mix_splits_and_stay_small() -> None:
    rows = [_row(number, "train", num=20_000) for number in range(4)] + [_row(9, "eval")]
    groups = list(row_groups(rows))
    assert [[row.prompt.sequence_id for row in group] for group in groups] == [["0", "1"], ["2", "3"], ["9"]]


def test_lists_that_do_not_fit_the_tokens_are_refused() -> None:
    table = encode([_row(0, "train"), _row(1, "train")], LAYOUT)
    short = encode([_row(0, "train", num=39), _row(1, "train", num=41)], LAYOUT)
    index = table.schema.get_field_index("log_z")
    with pytest.raises(CorruptionError, match="column log_z"):
        decode(table.set_column(index, table.schema.field("log_z"), short.column("log_z")), LAYOUT)


def test_a_shard_states_its_layout() -> None:
    assert layout_of(row_schema(LAYOUT)) == LAYOUT
    assert layout_of(pa.schema([("x", pa.int32())])) is None
