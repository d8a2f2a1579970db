"""distill: cache a teacher's targets once, train any number of students from them.

What is named here is the library for programs of one's own; docs/api.md describes it. Nothing heavy loads before a
name is used: ``import distill`` costs what an empty module costs.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from distill.cache.reader import CacheReader
    from distill.errors import (
        CorruptionError,
        DataError,
        DistillError,
        IdentityError,
        RetryError,
        StorageError,
        UsageError,
    )
    from distill.student.feed import Batch, Batches, batches
    from distill.student.kd import kd_loss, kd_loss_from_logits
    from distill.student.losses.divergence import Divergence
    from distill.student.losses.fused import Head

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Batches",
    "CacheReader",
    "CorruptionError",
    "DataError",
    "DistillError",
    "Divergence",
    "Head",
    "IdentityError",
    "RetryError",
    "StorageError",
    "UsageError",
    "batches",
    "kd_loss",
    "kd_loss_from_logits",
    "open",
]

_ERRORS = (
    "CorruptionError",
    "DataError",
    "DistillError",
    "IdentityError",
    "RetryError",
    "StorageError",
    "UsageError",
)
_HOMES = {
    "CacheReader": "distill.cache.reader",
    "Batch": "distill.student.feed",
    "Batches": "distill.student.feed",
    "batches": "distill.student.feed",
    "kd_loss": "distill.student.kd",
    "kd_loss_from_logits": "distill.student.kd",
    "Divergence": "distill.student.losses.divergence",
    "Head": "distill.student.losses.fused",
    **dict.fromkeys(_ERRORS, "distill.errors"),
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'distill' has no attribute '{name}'")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


def open(path: str | Path) -> "pd.DataFrame":
    """The cache at ``path`` as a DataFrame, one row per sequence, its targets as [L-1, k] arrays.

    See ``distill.cache.frames.open_frame``.
    """
    from distill.cache.frames import open_frame

    return open_frame(path)
