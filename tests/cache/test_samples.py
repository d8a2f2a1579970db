"""Protects ``samples.parquet``: what was written is read, and nothing but the file that the manifest names."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache.reader import CacheReader
from distill.cache.samples import SAMPLES_FILE, Sample, read_samples, render_samples, samples_schema
from distill.errors import CorruptionError
from distill.report.verify import verify

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ids = st.lists(st.integers(0, 199), max_size=6)
samples = st.builds(
    Sample,
    prompt_id=texts,
    domain=texts,
    prompt=texts,
    input_ids=ids.map(lambda values: (*values, 7)),
    response=texts,
    response_ids=ids.map(tuple),
)
TWO = [
    Sample(prompt_id="p", domain="medical", prompt="Why?", input_ids=(5, 6), response="肺", response_ids=(9,)),
    Sample(prompt_id="q", domain="general", prompt="", input_ids=(0,), response="", response_ids=()),
]


@pytest.fixture
def sampled(tmp_path, filler):
    """A sealed cache with two samples."""
    writer = filler(tmp_path / "cache", 3)
    writer.put_once(SAMPLES_FILE, render_samples(TWO))
    filler(tmp_path / "cache", None)
    return tmp_path / "cache"


def test_samples_are_sealed_and_read(sampled):
    reader = CacheReader.open(sampled)
    assert SAMPLES_FILE in reader.files
    assert read_samples(reader) == TWO
    assert verify(sampled).ok


@pytest.fixture(scope="module")
def begun(tmp_path_factory, teacher, plan_of, fill):
    """A cache of one unit that is not sealed."""
    root = tmp_path_factory.mktemp("begun") / "cache"
    fill(root, teacher, plan_of(teacher, rows={"general": 8}), num_units=1)
    return CacheReader.open(root, allow_incomplete=True)


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(samples, max_size=4))
def test_any_rows_come_back(rows, begun):
    (begun.root / SAMPLES_FILE).write_bytes(render_samples(rows))
    assert read_samples(begun) == rows


def test_the_same_rows_make_the_same_bytes():
    assert render_samples(TWO) == render_samples(list(TWO))


def test_a_cache_without_samples(cache):
    assert read_samples(CacheReader.open(cache)) == []


def test_a_file_that_came_after_the_seal_is_not_read(cache):
    (cache / SAMPLES_FILE).write_bytes(render_samples(TWO))
    assert read_samples(CacheReader.open(cache)) == []


@pytest.mark.parametrize("damage", ["flip", "other", "missing"])
def test_a_file_that_is_not_the_sealed_one_is_refused(sampled, damage):
    path = sampled / SAMPLES_FILE
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.unlink()
    if damage != "missing":
        path.write_bytes(data if damage == "flip" else render_samples(TWO[:1]))
    with pytest.raises(CorruptionError, match=r"samples\.parquet .*Restore"):
        read_samples(CacheReader.open(sampled))


def parquet(table: pa.Table, **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"compression": "zstd", "use_dictionary": False, **options})
    return buffer.getvalue()


def table_of(sample: Sample, num: int = 1) -> pa.Table:
    return pq.read_table(io.BytesIO(render_samples([sample] * num)))


ATTACKS = {
    "columns": parquet(table_of(TWO[0]).drop_columns(["domain"])),
    "ids": render_samples([Sample(prompt_id="", domain="", prompt="", input_ids=(200,), response="", response_ids=())]),
    "no prompt": render_samples(
        [Sample(prompt_id="", domain="", prompt="", input_ids=(), response="", response_ids=())]
    ),
    "bomb": parquet(
        pa.Table.from_batches(
            [
                *table_of(TWO[0])
                .set_column(2, samples_schema().field("prompt"), pa.array(["x" * (65 * 2**20)]))
                .to_batches()
            ],
            samples_schema(),
        )
    ),
    "dictionary": parquet(table_of(TWO[0], 9), use_dictionary=True),
    "no parquet": b"PAR1" * 9,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_no_samples_file_is_refused(attack, begun):
    (begun.root / SAMPLES_FILE).write_bytes(ATTACKS[attack])
    with pytest.raises(CorruptionError, match="samples"):
        read_samples(begun)
