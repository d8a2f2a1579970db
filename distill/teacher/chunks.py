"""A vocabulary's size and the free memory flow in, how many positions have logits at the same time flows out.

Logits are the largest thing that capture makes: positions × vocabulary numbers. They exist for one chunk of positions
at a time; when memory runs out all the same, the chunk is halved for good and the work goes on.
"""

from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

Part = TypeVar("Part")

# A GPU is busy with this many bytes of logits; a CPU is fastest where products are large and its caches near.
_ENOUGH = {"cuda": 1 << 30, "cpu": 96 << 20}
_SHARE = 4  # of the free memory at most one part in so many


def chunk_rows(num_ids: int, *, is_cuda: bool, free: int | None = None) -> int:
    """Positions in a chunk; 8 bytes for each of their logits, which exist twice for a moment."""
    wanted = _ENOUGH["cuda" if is_cuda else "cpu"]
    return max(1, (wanted if free is None else min(wanted, free // _SHARE)) // (8 * num_ids))


class Chunks:
    """Positions in chunks that fit into the memory of ``device``."""

    def __init__(self, num_ids: int, device: torch.device) -> None:
        self._num_ids, self._device = num_ids, device
        self._most = 2**31
        self.rows = chunk_rows(num_ids, is_cuda=device.type == "cuda")

    def measure(self) -> None:
        """Looks at the free memory again: an engine takes its own only when it is about to run."""
        is_cuda = self._device.type == "cuda"
        free = torch.cuda.mem_get_info(self._device)[0] if is_cuda else psutil.virtual_memory().available
        self.rows = min(self._most, chunk_rows(self._num_ids, is_cuda=is_cuda, free=free))

    def map(self, compute: Callable[[int, int], Part], num_rows: int) -> list[Part]:
        """``compute(start, stop)`` for consecutive positions. Raises what it raises, for one position also that."""
        parts: list[Part] = []
        start = 0
        while start < num_rows:
            stop = min(start + self.rows, num_rows)
            try:
                parts.append(compute(start, stop))
            except RuntimeError as error:
                if stop - start == 1 or not _lacks_memory(error):
                    raise
                self._most = self.rows = (stop - start) // 2
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            start = stop
        return parts


def _lacks_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
