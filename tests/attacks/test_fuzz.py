"""Whatever a file of a cache or a checkpoint holds, its reader gives what was committed or one of distill's errors.

Bytes are changed as they lie; and what the bytes mean is changed with the checksum made right again, as an attacker
would. The seed is fixed. ``make torture`` runs the same for longer (``benchmarks.faults --mutations``).
"""

from pathlib import Path
from typing import Any

import pytest

from distill.cache.reader import CacheReader
from tests.attacks.forging import put_shard, refused, shard_of
from tests.attacks.mutations import KINDS, fuzz

MUTATIONS = 40  # of each kind of file


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fuzz(tmp_path_factory.mktemp("fuzz"), mutations=MUTATIONS, seed=7)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_give_errors_or_the_truth(figures: dict[str, Any], kind: str) -> None:
    found = figures[kind]
    assert (found["wrong"], found["escaped"]) == (0, 0), found
    assert found["mutations"] == MUTATIONS == sum(found[end] for end in ("refused", "harmless", "changed"))
    assert found["refused"] > MUTATIONS / 3


def test_a_column_whose_name_is_no_text(cache: Path) -> None:
    """Found by mutating: the library tells names apart only when asked, and then with an error of its own."""
    reader = CacheReader.open(cache)
    content = shard_of(reader.read_unit(reader.commits[0]), reader)
    start, found, rest = content.rpartition(b"list")
    put_shard(cache, start + b"lis\xf4" + rest)
    assert found
    assert "unit 00000: " in refused("inspect", cache)
