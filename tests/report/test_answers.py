"""Protects the report's answers: those of each stage's last evaluation, as text, whatever else the file holds."""

import json

from distill.report.answers import answers_table
from distill.report.page import to_html
from distill.report.run_page import run_page


def answer(step, **changes):
    texts = {"domain": "medical", "prompt": "why", "student": f"at {step}", "reference": "so", "author": "data"}
    return json.dumps({"step": step, **texts, **changes})


def stage(run, number, *samples):
    """A stage with one step in its metrics, and these lines of samples."""
    folder = run / f"stage{number}"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "losses": {"total": 1.0}}) + "\n")
    if samples:
        (folder / "samples.jsonl").write_text("\n".join(samples))


def test_the_last_answers_of_each_stage_are_shown(tmp_path):
    stage(tmp_path, 1, answer(0), answer(8), answer(8, domain="general", student="x" * 999))
    stage(tmp_path, 2)
    stage(tmp_path, 3, answer(4, author="teacher"), '{"step": 9, "prompt": "tor', "[1]", '{"step": 9}')
    rows = answers_table(tmp_path).rows
    assert rows[:3] == (
        ("medical", "why", "data", "so"),
        ("", "", "stage1, step 8", "at 8"),
        ("", "", "stage3, step 4", "at 4"),
    )
    assert [row[:3] for row in rows[3:]] == [("general", "why", "data"), ("", "", "stage1, step 8")]
    assert len(rows[4][3]) == 600


def test_a_students_words_are_no_markup(tmp_path):
    stage(tmp_path, 1, answer(1, student="<script>alert(1)</script>"))
    page = to_html(run_page(tmp_path))
    assert "What the student says" in page
    assert "<script" not in page


def test_a_run_that_asked_nothing_has_no_such_table(tmp_path):
    stage(tmp_path, 1)
    assert answers_table(tmp_path).rows == ()
    assert "What the student says" not in to_html(run_page(tmp_path))
