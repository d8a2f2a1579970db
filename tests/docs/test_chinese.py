"""The Chinese pages have the commands, the code and the links of the English ones.

What it protects: a reader of Chinese from commands that changed elsewhere.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAIRS = [("README.md", "README.zh.md"), ("docs/quickstart.md", "docs/quickstart.zh.md")]


def blocks(text: str) -> list[list[str]]:
    """Fenced blocks and indented ones, comments left out."""
    fenced = re.findall(r"```\w+\n(.*?)```", text, flags=re.DOTALL)
    indented = re.findall(r"(?:^    .+\n)+", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return [[re.sub(r"\s+#.*$", "", line).rstrip() for line in block.splitlines()] for block in [*fenced, *indented]]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_commands_and_code_are_the_same(english: str, chinese: str) -> None:
    expected = blocks(read(english))
    assert len(expected) >= 3
    assert [[line for line in block if not line.startswith("#")] for block in blocks(read(chinese))] == [
        [line for line in block if not line.startswith("#")] for block in expected
    ]


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_sections_and_tables_are_as_many(english: str, chinese: str) -> None:
    ours, theirs = read(chinese), read(english)
    assert len(re.findall("^## ", ours, re.MULTILINE)) == len(re.findall("^## ", theirs, re.MULTILINE))
    assert len(re.findall(r"^\|", ours, re.MULTILINE)) == len(re.findall(r"^\|", theirs, re.MULTILINE))


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_they_name_each_other(english: str, chinese: str) -> None:
    assert f"]({Path(english).name})" in read(chinese)
    assert f"]({Path(chinese).name})" in read(english)


def test_figures_of_the_readme_are_the_same() -> None:
    ours, theirs = read("README.zh.md"), read("README.md")
    for number in re.findall(r"\b\d\d?%|\b0\.\d\d\b", theirs):
        assert number in ours, number
