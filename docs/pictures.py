"""A cache flows in, the pictures of docs/concepts.md flow out: the first charts of its report, as files of their own.

python -m docs.pictures runs/demo/cache        # after `make demo`
"""

import sys
from pathlib import Path

from distill.report.cache_page import cache_page

FOLDER = Path(__file__).parent / "pictures"
NAMES = {
    "Teacher's mass inside its k likeliest ids": "mass.svg",
    "Distance of the targets to the teacher": "distance.svg",
}
STYLE = """<style>
svg { font-family: system-ui, "Noto Sans", sans-serif; --ink: #1c2024; --line: #c9ced6; --series-1: #1f6fd6;
  --series-2: #c8640a; --series-3: #128a5c; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e8eb; --line: #3f4650; --series-1: #6aa8ff; --series-2: #f2a055;
  --series-3: #4cc793; } }
</style>"""


def write_pictures(cache: Path, folder: Path) -> list[Path]:
    """The pictures of ``cache`` in ``folder``; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {chart.title: chart.drawing.svg() for chart in cache_page(cache).charts}
    paths = []
    for title, name in NAMES.items():
        head, rest = drawn[title].split(">", 1)
        head = head.replace("<svg ", '<svg width="480" ', 1)
        path = folder / name
        path.write_text(f"{head}>\n{STYLE}{rest}\n", encoding="utf-8")
        paths.append(path)
    return paths


if __name__ == "__main__":
    for written in write_pictures(Path(sys.argv[1]), FOLDER):
        print(written)
