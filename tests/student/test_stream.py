"""Protects the stream: the same examples from any position, and no more than the window and the next one in memory."""

import numpy as np
import pytest

from distill.cache.reader import CacheReader
from distill.config import ShareConfig
from distill.errors import CorruptionError
from distill.student.mixture import assign_domains
from distill.student.order import DomainOrder, UnitRows
from distill.student.stream import TrainStream

NUM, BATCH = 120, 4


@pytest.fixture
def parts(world):
    reader = CacheReader.open(world.cache)
    orders = [
        DomainOrder(
            [UnitRows(unit=c.unit, num_rows=c.num_rows.train) for c in reader.units(domain)],
            domain=domain,
            seed=1,
            shard_window=2,
        )
        for domain in ("general", "medical")
    ]
    shares = {"general": ShareConfig(schedule="linear", start=0.7, end=0.3), "medical": ShareConfig(start=0.5)}
    return reader, orders, assign_domains(shares, NUM)


def read(parts, position):
    reader, orders, assigned = parts
    with TrainStream(reader, orders, assigned, max_length=24) as stream:
        steps = list(stream.steps(position, BATCH))
    return [[(example.domain, tuple(example.input_ids)) for example in step] for step in steps]


def test_any_position_continues_the_same_sequence(parts):
    whole = read(parts, 0)
    assert [len(step) for step in whole] == [BATCH] * (NUM // BATCH)
    for step in (1, 7, 29):
        assert read(parts, step * BATCH) == whole[step:]


def test_domains_come_as_assigned_and_each_walks_its_own_epochs(parts):
    examples = [example for step in read(parts, 0) for example in step]
    assert [domain for domain, _ in examples] == [("general", "medical")[d] for d in parts[2]]
    for number, domain in enumerate(("general", "medical")):
        own = [ids for name, ids in examples if name == domain]
        epoch = own[: parts[1][number].num_rows]
        assert len(set(epoch)) == parts[1][number].num_rows < len(own)


class CountingReader:
    """Passes on to a reader and notes which units were asked for."""

    def __init__(self, reader):
        self.commits, self._reader, self.read = reader.commits, reader, []

    def sequences(self, commit, split):
        self.read.append(commit.unit)
        return self._reader.sequences(commit, split)


def test_only_the_window_and_the_next_one_are_read(parts):
    reader, orders, _ = parts
    counting = CountingReader(reader)
    with TrainStream(counting, orders[:1], np.zeros(NUM, np.uint8), max_length=24) as stream:
        next(stream.steps(0, BATCH))
    assert 2 <= len(counting.read) <= 4


def test_damage_stops_the_stream_before_a_step_sees_it(parts, tmp_path):
    import shutil

    reader, orders, assigned = parts
    shutil.copytree(reader.root, tmp_path / "cache")
    shard = tmp_path / "cache" / reader.units("medical")[0].shard
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptionError, match="unit"):
        read((CacheReader.open(tmp_path / "cache"), orders, assigned), 0)
