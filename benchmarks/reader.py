"""How fast one core writes and reads a cache, and how many bytes a token takes: ``python -m benchmarks.reader``.

The rows are made up, with the shapes of a real cache: k=64, three temperatures, hidden states in 128 bytes, a
vocabulary of 152,000, sequences of 512 tokens. Writing is all that ``CacheWriter.commit`` does: checking the numbers,
encoding, page checksums, fsync, reading back, hashing. Reading goes through to numpy arrays, once with the SHA-256 of
each shard (a reader's first time) and then with the page checksums alone; and, as ``distill.batches`` does, shuffled
and padded through to the tensors of a step, by the processor's time of all threads. For the share of a step that waits
for them, batches are taken as fast as a student of 20,000 tokens a second does, which a 7B on one GPU does not reach.
"""

import argparse
import contextlib
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from distill import batches
from distill.cache.codec import decode, encode
from distill.cache.plan import Identity, Plan, Recorded, Source, plan_units
from distill.cache.projection import Projection
from distill.cache.reader import CacheReader
from distill.cache.sanity import problem
from distill.cache.schema import Layout, parquet_options
from distill.cache.shard import row_groups
from distill.cache.writer import CacheWriter
from distill.records import Prompt, SequenceTargets, Targets

VOCAB, TOP_K, LENGTH = 152_000, 64, 512
TEMPERATURES = (4.0, 2.0, 1.0)
WIDTHS = ((6, 32), (4, 96), (2, 224))  # 128 bytes
UNIT_ROWS = 64
PACE = 20_000  # tokens per second of a fast student
EPOCHS = 4


def made_up_projection(rng: np.random.Generator) -> Projection:
    """A projection of the right widths; its vocabulary is small, since only the widths matter here."""
    rank = sum(count for _, count in WIDTHS)
    return Projection(
        mean_D=np.zeros(512, np.float32),
        down_RD=rng.standard_normal((rank, 512)).astype(np.float32),
        basis_VR=rng.standard_normal((16, rank)).astype(np.float16),
        bias_V=np.zeros(16, np.float32),
        variance_R=np.arange(rank, 0, -1, dtype=np.float32),
        widths=WIDTHS,
        logit_scale=1.0,
        soft_cap=None,
        explained=0.9,
    )


def made_up_targets(rng: np.random.Generator, projection: Projection, num: int) -> Targets:
    """Consistent targets: skewed ids, falling log-probabilities, masses that sum to 1 at each temperature."""
    strata = (np.arange(TOP_K) + rng.random((num, TOP_K))) / TOP_K
    distinct_ids = ((VOCAB - TOP_K) * strata**2).astype(np.int32) + np.arange(TOP_K, dtype=np.int32)
    topk_ids = rng.permuted(distinct_ids, axis=1)
    gaps = rng.exponential(2.0, (num, TOP_K)) / np.arange(1, TOP_K + 1)
    falling = -np.cumsum(gaps, axis=1)
    tail_mass = np.stack([rng.beta(*shape, num) for shape in ((20, 2), (6, 4), (1, 12))], axis=1)
    logprobs = falling - _log_sum_exp(falling)[:, None] + np.log1p(-tail_mass[:, -1:])
    log_z = np.stack([_log_sum_exp(logprobs / T) for T in TEMPERATURES], axis=1) - np.log1p(-tail_mass)
    return Targets(
        topk_ids=topk_ids,
        topk_logprobs=logprobs.astype(np.float32),
        log_z=log_z.astype(np.float32),
        log_tail=np.log(tail_mass).astype(np.float32),
        hidden=projection.quantise(rng.standard_normal((num, projection.rank))),
        entropy=rng.gamma(2.0, 1.0, num).astype(np.float32),
    )


def _log_sum_exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    top = values.max(axis=1)
    return np.asarray(np.log(np.exp(values - top[:, None]).sum(axis=1)) + top)


def made_up_row(rng: np.random.Generator, projection: Projection, number: int) -> SequenceTargets:
    """One sequence."""
    prompt = Prompt(
        sequence_id=f"{number:064x}",
        prompt_id=f"{number:064x}",
        domain="general",
        split="train",
        source=f"general.jsonl:{number}",
        metadata={"department": "cardiology"},
        prompt=" ".join(f"word{value}" for value in rng.integers(0, 9999, LENGTH // 3)),
        response=" ".join(f"word{value}" for value in rng.integers(0, 9999, LENGTH // 3)),
        input_ids=rng.integers(0, VOCAB, LENGTH).astype(np.int32),
        loss_mask=np.arange(LENGTH - 1) > LENGTH // 3,
    )
    return SequenceTargets(prompt=prompt, targets=made_up_targets(rng, projection, LENGTH - 1))


def made_up_plan(num_rows: int) -> Plan:
    """A plan for ``num_rows`` rows of one source."""
    source = Source(domain="general", path="general.jsonl", sha256="0" * 64, num_rows=num_rows, split="train")
    identity = Identity(
        teacher_weights="made up",
        token_map="made up",
        chat_template="made up",
        vocab_size=VOCAB,
        mask_policy="assistant",
        overlong="truncate",
        max_length=LENGTH,
        dtype="bfloat16",
        quantisation=None,
        head_dtype="float32",
        top_k=TOP_K,
        temperatures=TEMPERATURES,
        hidden_bytes=128,
        trust_remote_code=False,
    )
    return Plan(
        identity=identity,
        recorded=Recorded(teacher="made up", engine="none", engine_version="0"),
        sources=(source,),
        eval_fraction=0.0,
        units=tuple(plan_units([source], UNIT_ROWS)),
    )


def measure(folder: Path, num_units: int) -> dict[str, float]:
    """Seconds and bytes as rates for each token, the best of all units."""
    rng = np.random.default_rng(0)
    projection = made_up_projection(rng)
    writer = CacheWriter.open(folder, made_up_plan(num_units * UNIT_ROWS))
    writer.put_once("projection.safetensors", projection.to_bytes())
    num_tokens = UNIT_ROWS * LENGTH
    write_seconds = []
    for unit in writer.missing_units():
        rows = [made_up_row(rng, projection, number) for number in range(unit.start, unit.stop)]
        start = time.perf_counter()
        writer.commit(unit, rows, rejects=[], num_input_rows=len(rows))
        write_seconds.append(time.perf_counter() - start)
    writer.seal()
    reader = CacheReader.open(folder)
    first_seconds, later_seconds = [], []
    for seconds in (first_seconds, later_seconds, later_seconds):
        for commit in reader.commits:
            start = time.perf_counter()
            sequences = reader.sequences(commit, "train")
            seconds.append(time.perf_counter() - start)
            assert len(sequences) == UNIT_ROWS
    return {
        "write_tokens_per_s": num_tokens / min(write_seconds),
        "read_tokens_per_s": num_tokens / min(later_seconds),
        "first_read_tokens_per_s": num_tokens / min(first_seconds),
        "bytes_per_token": sum(commit.num_bytes for commit in reader.commits) / (num_units * num_tokens),
    }


def to_tensors(folder: Path) -> dict[str, float]:
    """Tokens per second of processor from shards to tensors, without the first epoch, and memory over the epochs."""
    feed = batches(folder, temperature=2, batch_tokens=16 * LENGTH, max_length=LENGTH)
    seconds, resident = [], []
    began = time.process_time()
    for batch in feed.walk(epochs=EPOCHS):
        if batch.position % feed.num_sequences == 0:
            seconds.append(time.process_time() - began)
            resident.append(psutil.Process().memory_info().rss)
            began = time.process_time()
    tokens = feed.num_sequences * LENGTH
    return {
        "first_tensor_tokens_per_s": tokens / seconds[0],  # with SHA-256
        "tensor_tokens_per_s": tokens / min(seconds[1:]),
        "memory_growth_over_epochs": max(resident[1:]) / resident[0] - 1,
    }


def waiting(folder: Path) -> float:
    """Share of the time in which a student that trains PACE tokens per second waits for a batch, after the first."""
    feed = batches(folder, temperature=2, batch_tokens=16 * LENGTH, max_length=LENGTH)
    walk = feed.walk()
    former = next(walk).position
    waited = trained = 0.0
    while True:
        began = time.perf_counter()
        batch = next(walk, None)
        waited += time.perf_counter() - began
        if batch is None:
            return waited / (waited + trained)
        step = (batch.position - former) * LENGTH / PACE
        time.sleep(step)
        trained, former = trained + step, batch.position


def overheads(folder: Path, num_units: int) -> dict[str, float]:
    """What safety costs, as a share: of writing with ``pyarrow.parquet.write_table``, of reading with ``read``.

    Writing: page checksums, SHA-256, fsync, reading back and the commit record, against the same table written with the
    same encodings and none of these; building the table and looking at its numbers are in neither. Reading: page
    checksums (``first``: and the SHA-256) against neither, both up to numpy arrays. By the clock, with the disk's fsync
    in it, and by the processor's time. The least of all units is taken on both sides.
    """
    rng = np.random.default_rng(1)
    projection = made_up_projection(rng)
    writer = CacheWriter.open(folder, made_up_plan(num_units * UNIT_ROWS))
    writer.put_once("projection.safetensors", projection.to_bytes())
    layout = Layout.of(writer.plan.identity, WIDTHS)
    options = parquet_options(layout) | {"write_page_checksum": False}
    taken = _Stopwatch()
    for unit in writer.missing_units():
        rows = [made_up_row(rng, projection, number) for number in range(unit.start, unit.stop)]
        with taken("encode"):
            tables = [encode(group, layout) for group in row_groups(rows)]
        with taken("look"):
            assert not any(problem(row, identity=writer.plan.identity, layout=layout) for row in rows)
        table = pa.concat_tables(tables)
        with taken("plain_write"):
            pq.write_table(table, folder / "plain.parquet", row_group_size=len(tables[0]), **options)
        with taken("commit"):
            writer.commit(unit, rows, rejects=[], num_input_rows=len(rows))
    writer.seal()
    reader = CacheReader.open(folder)
    for commit in reader.commits:
        with taken("first_read"):
            reader.sequences(commit, "train")
        with taken("read"):
            reader.sequences(commit, "train")
        with taken("plain_read"):
            decode(pq.ParquetFile(folder / commit.shard).read(use_threads=False), layout)
    found = {}
    for clock, least in (("", taken.wall), ("_cpu", taken.cpu)):
        written = least["commit"] - least["encode"] - least["look"]
        found[f"writer_overhead{clock}"] = written / least["plain_write"] - 1
        found[f"reader_overhead{clock}"] = least["read"] / least["plain_read"] - 1
        found[f"reader_overhead_first{clock}"] = least["first_read"] / least["plain_read"] - 1
    return found


class _Stopwatch:
    """The least seconds that each piece of work took, by the clock and by the processor."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.wall[name] = min(wall, self.wall.get(name, wall))
        self.cpu[name] = min(cpu, self.cpu.get(name, cpu))


def bytes_by_column(folder: Path, num_tokens: int) -> dict[str, float]:
    """Compressed bytes per token of each column."""
    sizes: dict[str, float] = {}
    for path in (folder / "shards").glob("*.parquet"):
        footer = pq.read_metadata(path)
        for group in range(footer.num_row_groups):
            for index in range(footer.num_columns):
                chunk = footer.row_group(group).column(index)
                name = chunk.path_in_schema.split(".")[0]
                sizes[name] = sizes.get(name, 0.0) + chunk.total_compressed_size / num_tokens
    return sizes


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reader", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--units", type=int, default=6, help=f"units of {UNIT_ROWS} sequences")
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        numbers = measure(folder, arguments.units)
        numbers |= to_tensors(folder)
        shares = {"waiting_share_of_a_step": waiting(folder)}
        columns = bytes_by_column(folder, arguments.units * UNIT_ROWS * LENGTH)
        shares |= overheads(Path(name) / "overheads", arguments.units)
    table = Table("measure", "value", title=f"{arguments.units * UNIT_ROWS} sequences of {LENGTH} tokens, one core")
    for key, value in numbers.items():
        text = f"{value:.1%}" if value < 1 else f"{value:,.1f}" if value < 10_000 else f"{value:,.0f}"
        table.add_row(key, text)
    for key, value in shares.items():
        table.add_row(key, f"{value:.1%}")
    for column, value in columns.items():
        table.add_row(f"bytes per token of {column}", f"{value:.2f}")
    Console().print(table)
    if arguments.json:
        machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
        report = {**numbers, **shares, "bytes_by_column": columns, "machine": {**machine, "pyarrow": pa.__version__}}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
