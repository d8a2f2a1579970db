"""Protects the token view: the right sequences, probabilities that add up, and no trust in a record's text."""

import json
from pathlib import Path

import pytest

from distill.cache.reader import CacheReader
from distill.cache.views import held_out_rows
from distill.errors import CorruptionError
from distill.report.page import to_html
from distill.report.run_page import run_page
from distill.report.tokens import cache_views, run_views
from distill.report.viewer import payload, views_html
from tests.report.conftest import record


def test_a_cache_shows_held_out_sequences_of_each_domain(cache: Path) -> None:
    reader = CacheReader.open(cache)
    (view,) = cache_views(reader)
    assert "held-out" in view.title
    wanted = [row.prompt.source for domain in reader.domains for row in list(held_out_rows(reader, domain))[:2]]
    assert [sequence.source for sequence in view.sequences] == wanted
    first = next(held_out_rows(reader, reader.domains[0]))
    token = view.sequences[0].tokens[1]
    assert token.text == f"w{first.prompt.input_ids[view.sequences[0].before + 1]}"
    for sequence in payload((view,)):
        for shown in sequence:
            for rows in shown["tables"].values():
                assert sum(value for _, value, _ in rows) == pytest.approx(1, abs=2e-3)


def test_a_run_shows_each_stage_the_last_one_open(run: Path) -> None:
    views = run_views(run)
    assert [view.title for view in views] == [f"Teacher and student, stage{n}, step 4" for n in (3, 2, 1)]
    assert [view.is_open for view in views] == [True, False, False]
    (run / "stage3" / "tokens.json").unlink()
    assert [view.is_open for view in run_views(run)] == [True, False]


def test_text_of_a_record_is_no_markup(run: Path) -> None:
    text = to_html(run_page(run))
    assert "<b>no</b>" not in text
    assert text.count("</script>") == 2
    assert r"\u003c/script\u003e" in text


def test_spaces_and_what_has_no_glyph_are_seen(run: Path) -> None:
    changed = record(4)
    choices = [[1, "  a ", 0.5], [2, " ", 0.2], [3, "", 0.1], [4, "\x1b[2J", 0.1]]
    changed["sequences"][0]["tokens"][1]["student"]["choices"] = choices
    (run / "stage3" / "tokens.json").write_text(json.dumps(changed))
    rows = payload(run_views(run)[:1])[0][1]["tables"]["Student"]
    assert [label for label, *_ in rows] == ["␣␣a␣", "␣", "∅", "�[2J", "all other tokens"]


def test_a_page_without_records_has_no_script(run: Path) -> None:
    for path in run.glob("stage*/tokens.json"):
        path.unlink()
    assert "<script" not in to_html(run_page(run))
    assert views_html(()) == ""


@pytest.mark.parametrize(
    "content", ["", "[]", '{"step": "x", "sequences": []}', '{"step": 1}', '{"step": 1, "sequences": [7]}']
)
def test_a_damaged_record_is_named(run: Path, content: str) -> None:
    (run / "stage2" / "tokens.json").write_text(content)
    with pytest.raises(CorruptionError, match=r"stage2/tokens\.json is no record of tokens"):
        run_page(run)
