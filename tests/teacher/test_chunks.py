"""Logits fit into the memory that is there, and a lack of it halves the chunk instead of ending the run."""

import subprocess
import sys

import pytest
import torch

from distill.teacher.chunks import Chunks, chunk_rows

# In a process whose address space is bounded: 600 MB more than it has once torch is loaded.
SHORT_OF_MEMORY = """
import resource, torch
from distill.teacher.capture import Head, Spec, statistics
from distill.teacher.chunks import Chunks

torch.set_num_threads(1)
torch.manual_seed(0)
head = Head(torch.randn(50_000, 16), num_ids=50_000)
hidden_ND = torch.randn(3000, 16)
spec = Spec(top_k=8, temperatures=(2.0, 1.0))
small = Chunks(50_000, torch.device("cpu"))
expected = statistics(head, hidden_ND, spec, chunks=small)
chunks = Chunks(50_000, torch.device("cpu"))
chunks.rows = 3000
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000, used + 600_000_000))
found = statistics(head, hidden_ND, spec, chunks=chunks)
assert torch.equal(found.topk_ids, expected.topk_ids)
assert torch.allclose(found.log_tail, expected.log_tail, atol=1e-5)
chunks.measure()
print(chunks.rows)
"""


def test_a_lack_of_memory_halves_the_chunk_for_good() -> None:
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= 1500


def test_other_errors_and_a_position_that_does_not_fit_are_raised() -> None:
    chunks = Chunks(10, torch.device("cpu"))

    def broken(_start: int, _stop: int) -> None:
        raise RuntimeError("not about memory")

    def too_large(_start: int, _stop: int) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    with pytest.raises(RuntimeError, match="not about memory"):
        chunks.map(broken, 100)
    with pytest.raises(torch.OutOfMemoryError):
        chunks.map(too_large, 100)
    assert chunks.rows == 1


def test_every_position_is_computed_once_and_in_order() -> None:
    chunks = Chunks(10, torch.device("cpu"))
    chunks.rows = 64

    def fits(start: int, stop: int) -> list[int]:
        if stop - start > 5:
            raise torch.OutOfMemoryError("tried to allocate")
        return list(range(start, stop))

    assert [n for part in chunks.map(fits, 100) for n in part] == list(range(100))
    assert chunks.rows == 4


@pytest.mark.parametrize("free", [1 << 20, 1 << 28, 1 << 36])
def test_chunks_leave_most_of_the_free_memory(free: int) -> None:
    rows = chunk_rows(151_665, is_cuda=True, free=free)
    assert 1 <= rows <= 2**30 // (8 * 151_665)
    assert rows == 1 or rows * 8 * 151_665 <= free / 4
