"""The environment that torchrun sets flows in; which process this is, and what all of them agree on, flows out.

Processes of one run are called ranks. They start from the same files, see the same examples in the same order and take
the same decisions; what only one may do, the first rank does. A run of one process is the same with nobody to ask.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn

from distill.errors import DistillError, RetryError, UsageError

_BUCKET = 2**24  # numbers that are summed over the ranks in one go: 64 MB in float32
_TIMEOUT = timedelta(minutes=30)  # the first rank may write a large checkpoint meanwhile
_SIGNS_OF_LOSS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among ``world`` ones; ``local`` is its number on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @staticmethod
    def joined(device: str) -> "Ranks":
        """The ranks of this run, once all have come together; one process where torchrun did not start it.

        Raises UsageError where there are fewer GPUs than ranks, or the device is one that ranks cannot share.
        """
        world = os.environ.get("WORLD_SIZE", "1")
        if not world.isdigit() or int(world) <= 1:
            return ALONE
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UsageError(
                f"WORLD_SIZE is {world}, but {' and '.join(missing)} is not set, so the processes cannot find each "
                "other. Start them with torchrun, or unset WORLD_SIZE to train in one process."
            )
        ranks = Ranks(rank=int(os.environ["RANK"]), world=int(world), local=int(os.environ["LOCAL_RANK"]))
        on_gpu = ranks.device(device).startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(ranks.local)
        if not torch.distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            with _lost_peers():
                torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
        return ranks

    def device(self, name: str) -> str:
        """What ``name`` of the configuration means for this rank."""
        if self.world == 1:
            return name
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name not in ("cuda", "cpu"):
            raise UsageError(
                f"device is {name}, but {self.world} processes train together, each on a GPU of its own. Set it to "
                "auto, cuda or cpu, and choose GPUs with CUDA_VISIBLE_DEVICES."
            )
        if name == "cuda" and self.local >= torch.cuda.device_count():
            raise UsageError(
                f"process {self.local} of this machine has no GPU: torch sees {torch.cuda.device_count()}. Start at "
                "most that many processes with --nproc-per-node, or train on CPUs with --set device=cpu."
            )
        return f"cuda:{self.local}" if name == "cuda" else name

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    def first(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on the first rank, on every rank; or the DistillError that it raised there."""
        if self.world == 1:
            return action()
        told: list[tuple[T | None, DistillError | None]] = [(None, None)]
        if self.is_first:
            try:
                told = [(action(), None)]
            except DistillError as error:
                told = [(None, error)]
        with _lost_peers():
            torch.distributed.broadcast_object_list(told, src=0)
        result, refusal = told[0]
        if refusal is not None:
            raise refusal
        return result  # type: ignore[return-value]  # of type T where there is no error

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order. They are pickled: only processes of this run exchange them."""
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world
        with _lost_peers():
            torch.distributed.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on some rank."""
        if self.world == 1:
            return flag
        flags = torch.tensor([int(flag)])
        with _lost_peers():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return bool(flags.item())

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, which must pass the same shapes in the same order."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with _lost_peers():
                torch.distributed.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def take_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the first rank's, in case that devices differ in what they draw from a seed."""
        if self.world == 1:
            return
        for tensor in tensors:
            with _lost_peers():
                torch.distributed.broadcast(tensor, src=0)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over the ranks. A rank without a gradient adds 0; where no rank has one, there is none."""
        if self.world == 1 or not parameters:
            return
        used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        with _lost_peers():
            torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX)
        gradients = []
        for parameter, has_gradient in zip(parameters, used.tolist(), strict=True):
            if has_gradient:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        self.sum(gradients)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Say in one sentence when another rank is gone. Raises RetryError then."""
        if self.world == 1:
            yield
            return
        with _lost_peers():
            yield


ALONE = Ranks()


def leave() -> bool:
    """Take leave of the other ranks at the end of a run that succeeded; whether this rank speaks for all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return True
    is_first = torch.distributed.get_rank() == 0
    torch.distributed.destroy_process_group()
    return is_first


def _first_sentence(text: str) -> str:
    return text.partition("\n")[0].partition(". ")[0].rstrip(".")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to a size."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(item.numel() for item in bucket) + tensor.numel() > _BUCKET
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextlib.contextmanager
def _lost_peers() -> Iterator[None]:
    try:
        yield
    except DistillError:
        raise
    except RuntimeError as error:  # all errors of torch.distributed are
        reason = str(error)
        if isinstance(error, torch.distributed.DistError) or any(sign in reason for sign in _SIGNS_OF_LOSS):
            raise RetryError(
                f"another process of this run is gone or unreachable: {_first_sentence(reason)}. Its own message "
                "says why; what was saved is whole. Run the same command again to go on."
            ) from error
        raise
