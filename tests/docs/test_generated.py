"""Pages that are made from the program are those of this program: errors, the library's names, schemas.

What it protects: a new error, name or key without its row, and rows that name tests which are gone.
"""

import ast
from pathlib import Path

import pytest

import distill
from distill.cache import storage
from distill.config import TrainConfig, validated
from distill.errors import UsageError
from docs import api, errors, provoking, schemas

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["api", "errors", "schemas"])
def test_pages_are_as_their_scripts_make_them(name: str) -> None:
    made = {"api": api.page, "errors": errors.page, "schemas": schemas.page}[name]()
    written = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert written == made, f"docs/{name}.md is stale: run `python -m docs.{name}`"


def test_every_place_that_makes_an_error_has_a_row() -> None:
    rows = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").splitlines()
    raised = 0
    for path in (ROOT / "distill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = getattr(node.exc.func, "id", "")
                raised += name in errors.CODES
                if name in errors.CODES:
                    where = f"| `{path.relative_to(ROOT / 'distill').as_posix()}` |"
                    assert any(row.startswith(where) for row in rows), where
    assert raised > 150
    assert len(errors.sites()) == sum(row.startswith("| `") and row.count(" | ") >= 4 for row in rows)


def test_every_error_has_a_test_that_provokes_it_or_a_reason() -> None:
    keys = {site.key for site in errors.sites()}
    tests = errors.provoked() | errors.BY_PROCESS
    for key in sorted(keys):
        how = "provoke it in a test and run that with `-p docs.provoking`, or say why not in docs.errors.UNPROVOKED"
        assert (key in tests) != (key in errors.UNPROVOKED), f"{key}: {how}"
    gone = (set(tests) | set(errors.UNPROVOKED)) - keys
    assert not gone, f"there is no such error any more: {gone}"
    for test in sorted(set(tests.values())):
        assert errors.exists(test), test


def test_sentences_are_split_into_what_is_wrong_and_what_to_do() -> None:
    source = '_FIX = "Restore it."\ndef f(x):\n    raise DataError(f"{x} has 2 | 3 rows. {_FIX} Or stop.")\n'
    (site,) = errors._sites_of("cache/x.py", ast.parse(source))
    assert (site.says, site.fix, site.kind) == ("… has 2 | 3 rows.", "Restore it. Or stop.", "DataError")


def test_every_public_name_is_described() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in distill.__all__:
        assert f"### `{name}`\n" in text or f"| `{name}` |" in text, name


def test_an_error_is_recorded_by_the_line_that_made_it() -> None:
    found: dict[str, str] = {}
    with provoking.recording(found):
        with pytest.raises(UsageError):
            storage.root_of("s3://")
        with pytest.raises(UsageError):
            validated(TrainConfig, {"cache": "c", "student": "s", "out": "o", "stages": {4: {}}}, origin="x")
    assert "cache/storage.py: … names no bucket." in found
    assert {"config.py: there are stages 1, 2 and 3, no …", "config.py: …: …."} <= set(found)
    assert set(found.values()) == {"tests/docs/test_generated.py::test_an_error_is_recorded_by_the_line_that_made_it"}
    assert str(UsageError("plain again")) == "plain again"


def test_what_is_gone_is_forgotten_and_what_is_known_stays() -> None:
    key, other = "cache/storage.py: … names no bucket.", "config.py: …: …."
    here = "tests/docs/test_generated.py::test_what_is_gone_is_forgotten_and_what_is_known_stays"
    assert provoking.merged({key: here, "x.py: gone.": here}, {key: "tests/x.py::test_y"}) == {key: here}
    assert provoking.merged({key: "tests/x.py::test_gone", other: here}, {key: here}) == {key: here, other: here}
