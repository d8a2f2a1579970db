"""A cache's folder or a run's flows in, one self-contained HTML file flows out, and a PNG of each chart beside it."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.cache import storage
from distill.errors import DataError, UsageError
from distill.report.cache_page import cache_page
from distill.report.charts import Chart
from distill.report.curves import stage_folders
from distill.report.page import to_html
from distill.report.run_page import run_page

_OURS = re.compile(r"\d\d-[\w-]+\.png")  # files of an earlier report


@dataclass(frozen=True, slots=True, kw_only=True)
class HtmlReport:
    """The file that was written, what it is about (``cache`` or ``run``), and how much is in it.

    ``pictures`` is the folder with the charts as PNG files.
    """

    path: str
    pictures: str
    about: str
    num_charts: int
    num_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def write_report(source: str | Path, out: str | Path) -> HtmlReport:
    """Write the report about the cache, the run or the one stage at ``source`` to ``out``, over an older one.

    The charts go into a folder beside it as well, ``report-charts`` for ``report.html``, as PNG files in their order.

    Raises DataError when ``source`` is none of them, CorruptionError when what is read of it is damaged, UsageError
    without matplotlib or when ``out`` is a folder, StorageError when the disk refuses.
    """
    out = storage.local_root(out)
    if out.is_dir():
        raise UsageError(f"{out} is a folder. Name a file with --out, such as {out / 'report.html'}.")
    about = _kind(source)
    page = cache_page(source) if about == "cache" else run_page(Path(source))
    data = to_html(page).encode()
    storage.write(out, lambda file: file.write(data), need=len(data))
    pictures = out.with_name(f"{out.stem}-charts")
    _write_pictures(pictures, page.charts)
    return HtmlReport(
        path=str(out), pictures=str(pictures), about=about, num_charts=len(page.charts), num_bytes=len(data)
    )


def _write_pictures(folder: Path, charts: Sequence[Chart]) -> None:
    """``01-training-losses.png`` and so on; those of an earlier report that this one lacks are deleted."""
    written = set()
    for number, chart in enumerate(charts, 1):
        words = re.sub(r"[^a-z0-9]+", "-", chart.title.lower().replace("'", "")).strip("-")
        name = f"{number:02}-{words}.png"
        data = chart.drawing.png(chart.title)
        storage.write(folder / name, lambda file, data=data: file.write(data), need=len(data))  # type: ignore[misc]
        written.add(name)
    for path in folder.glob("*.png") if folder.is_dir() else ():
        if _OURS.fullmatch(path.name) and path.name not in written:
            storage.remove(path)


def _kind(source: str | Path) -> str:
    folder = storage.root_of(source)
    if not isinstance(folder, Path) or any((folder / name).is_file() for name in ("plan.json", "manifest.json")):
        return "cache"
    if stage_folders(folder):
        return "run"
    raise DataError(
        f"{source} is neither a cache, with a plan.json, nor a run, with stage1/metrics.jsonl. Name the folder that "
        "was --out of `distill cache-teacher` or of `distill train`."
    )
