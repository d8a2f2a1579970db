"""distill: cache a teacher's targets once, train any number of students from them."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__version__ = "0.1.0"


def open(path: str | Path) -> "pd.DataFrame":
    """The cache at ``path`` as a DataFrame, one row per sequence, its targets as [L-1, k] arrays.

    See ``distill.cache.frames.open_frame``.
    """
    from distill.cache.frames import open_frame

    return open_frame(path)
