"""A report tells a cache's and a run's numbers, is one file that loads nothing, and leaves each chart as a picture."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.cache.reader import CacheReader
from distill.errors import CorruptionError, DataError, UsageError
from distill.report import curves
from distill.report.distributions import sample
from distill.report.html import write_report
from distill.report.run_page import run_page
from tests.report.conftest import evaluation, step


def test_the_page_of_a_cache_says_what_the_cache_holds(cache: Path, tmp_path: Path) -> None:
    report = write_report(cache, tmp_path / "new" / "cache.html")
    text = (tmp_path / "new" / "cache.html").read_text(encoding="utf-8")
    assert (report.about, report.num_charts, report.num_bytes) == ("cache", 6, len(text.encode()))
    assert text.count('<svg role="img"') == 6
    reader = CacheReader.open(cache)
    assert f"<b>{sum(commit.num_targets.total for commit in reader.commits):,}</b><span>targets" in text
    assert reader.identity.teacher_weights in text


def test_mass_entropy_and_lengths_are_those_of_the_rows(cache: Path) -> None:
    reader = CacheReader.open(cache)
    found = sample(reader)
    rows = [row for commit in reader.commits for split in ("train", "eval") for row in reader.sequences(commit, split)]
    for index, temperature in enumerate(reader.temperatures):
        probs = [np.exp(row.targets.topk_logprobs / temperature - row.targets.log_z[:, [index]]) for row in rows]
        assert found.mass_TK[index] == pytest.approx(np.cumsum(np.concatenate(probs).mean(axis=0)), abs=1e-5)
    general = [row for row in rows if row.prompt.domain == "general"]
    trained = np.concatenate([row.targets.entropy[row.prompt.loss_mask] for row in general])
    assert sorted(found.entropy["general"]) == sorted(trained)
    assert sorted(found.lengths["general"]) == sorted(len(row.prompt.input_ids) for row in general)


def test_rejects_are_counted_by_reason_and_what_a_cache_says_stays_text(rejecting_cache: Path, tmp_path: Path) -> None:
    assert sample(CacheReader.open(rejecting_cache)).rejects == (
        ("row has N tokens", 2),
        ("no <script>answer</script>", 1),
    )
    report = write_report(rejecting_cache, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert report.num_charts == 5  # no fidelity positions here, but rejects
    assert text.count("<script") == 2  # the page's own, and its data
    assert html.escape("<b>$x_1$ 医学</b>") in text


def test_the_page_of_a_run_joins_its_stages_on_one_axis(run: Path, tmp_path: Path) -> None:
    report = write_report(run, tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert report.about == "run"
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    assert titles == [
        *(f"Held-out KL at T={temperature}" for temperature in (4, 2, 1)),
        "Held-out cross-entropy",
        "Held-out agreement",
        "Held-out agreement of five",
        "Held-out calibration error",
        "Held-out contrastive loss",
        "Calibration by stage",
        "Calibration by domain",
        "Training losses",
        "Learning rate",
        "Domains&#x27; shares",
        "Gradient norm",
    ]
    assert report.num_charts == len(titles)
    read = curves.read_run(run)
    assert [stage.start for stage in read.stages] == [0, 4, 8]
    assert [x for part in read.series["train/losses/total"] for x, _ in part] == list(range(1, 13))
    assert [len(part) for part in read.series["train/losses/feature"]] == [0, 4]
    assert [len(part) for part in read.series["train/grad_norm"]] == [3, 3, 3]


def test_every_chart_is_a_picture_beside_the_page(run: Path, tmp_path: Path) -> None:
    report = write_report(run, tmp_path / "run.html")
    pictures = sorted((tmp_path / "run-charts").iterdir())
    assert report.pictures == str(tmp_path / "run-charts")
    assert len(pictures) == report.num_charts
    assert [path.name for path in pictures[:3]] == [
        "01-held-out-kl-at-t-4.png",
        "02-held-out-kl-at-t-2.png",
        "03-held-out-kl-at-t-1.png",
    ]
    for path in pictures:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == 940  # pixels wide
    (tmp_path / "run-charts" / "mine.png").write_bytes(b"")
    write_report(run / "stage1", tmp_path / "run.html")
    left = {path.name for path in (tmp_path / "run-charts").iterdir()}
    assert "mine.png" in left
    assert not any("feature" in name for name in left)  # of stage 2, which this report is not about


def test_what_a_step_says_of_schedules_and_gradients_is_drawn(run: Path) -> None:
    norms = {"kl": 2.0, "ce": 0.5, "domain/general": 1.0}
    further = {"gradient_norms": norms, "temperature": 3.0, "weights": {"kl": 0.5}, "domain_weights": {"general": 1.5}}
    lines = [step(number, 1) | further | {"tokens_per_second": 10.0} for number in (1, 2)]
    lines.append({"kind": "sampling", "step": 2, "weights": {"cardiology": 1.25, "neurology": 0.75}})
    (run / "stage1" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    charts = {chart.title: chart for chart in run_page(run / "stage1").charts}
    rows = {title: {row[0]: row[-1] for row in chart.rows} for title, chart in charts.items()}
    assert rows["Gradient norms of losses"] == {"KL": "2", "cross-entropy": "0.5"}
    assert rows["Gradient norms of domains"] == {"general": "1"}
    assert rows["Temperature"] == {"temperature": "3"}
    assert rows["Loss weights"] == {"KL": "0.5"}
    assert rows["Domains' factors"] == {"general": "1.5"}
    assert rows["Sampling weights"] == {"cardiology": "1.25", "neurology": "0.75"}
    assert rows["Speed"] == {"tokens/s": "10"}
    assert rows["Domains' shares"] == {"general": "0.4", "medical": "0.4"}  # scheduled, last


def test_calibration_and_the_table_tell_each_stage_and_domain(run: Path) -> None:
    page = run_page(run)
    charts = {chart.title: chart for chart in page.charts}
    by_stage, by_domain = charts["Calibration by stage"], charts["Calibration by domain"]
    assert list(dict.fromkeys(row[0] for row in by_stage.rows)) == ["after stage1", "after stage2", "after stage3"]
    assert by_domain.rows[1] == ("general", "0.900", "0.500", "1")
    table = page.summary
    assert table.header == (
        *("", "domain", "KL T=4", "KL T=2", "KL T=1", "CE", "ppl", "top-1", "top-5", "ECE", "contrastive"),
    )
    assert len(table.rows) == 3 * 2 * 2  # stages, before and after, domains
    assert table.rows[3] == (
        *("after stage1", "medical", "0.4000", "", "0.4000", "2.6000", "20.0000", "29.0%", "50.0%", "0.1750", "0.5000"),
    )


def test_the_top_of_a_runs_page_says_how_far_each_domain_came(run: Path, tmp_path: Path) -> None:
    lines = [evaluation(0, 1.0), evaluation(4, 1.0)]
    for line in lines:
        del line["domains"]["general"]
    (run / "stage3" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = run_page(run)
    assert page.facts == (
        ("2.00 → 0.40", "KL to the teacher at T=1, held out, general"),  # last measured after stage 2
        ("25% → 29%", "first choices that are the teacher's, general"),
        ("2.00 → 0.40", "KL to the teacher at T=1, held out, medical"),
        ("25% → 29%", "first choices that are the teacher's, medical"),
        ("4 + 4 + 4", "optimizer steps of stage1, stage2, stage3"),
        ("800", "tokens trained on"),
    )
    assert "Calibration by domain" not in {chart.title for chart in page.charts}  # one domain: the same as by stage
    write_report(run, tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == ["Held-out figures", "Held out, over the steps", "Training, over the steps", "Token by token"]


def test_one_stage_is_a_report_too_and_the_same_numbers_are_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first = write_report(run / "stage2", tmp_path / "a.html")
    write_report(run / "stage2", tmp_path / "b.html")
    assert first.about == "run"
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_nothing_in_the_page_is_loaded_from_elsewhere(cache: Path, run: Path, tmp_path: Path) -> None:
    for source in (cache, run):
        write_report(source, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        script = files("distill.report").joinpath("tokens.js").read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in text
        assert not re.search("fetch|innerHTML|eval|import", script)
        text = text.replace(f"<script>{script}</script>", "")
        namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert set(re.findall(r"https?://[^\"'<> ]+", text)) <= namespaces
        assert not re.search(r"<script(?! type=.application/json)|@import|url\((?!#)", text)


def test_what_is_no_cache_and_no_run_is_refused(tmp_path: Path, run: Path, cache: Path) -> None:
    with pytest.raises(DataError, match="neither a cache"):
        write_report(tmp_path, tmp_path / "x.html")
    with pytest.raises(UsageError, match="is a folder"):
        write_report(run, tmp_path)
    for path in run.glob("stage*/metrics.jsonl"):
        path.write_text("")
    with pytest.raises(DataError, match="no metrics"):
        write_report(run, tmp_path / "x.html")
    shard = next((cache / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(CorruptionError):
        write_report(cache, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_what_a_cache_or_a_run_lacks_is_left_out(
    tmp_path: Path, make_teacher: Callable[..., Any], plan_of: Callable[..., Any], fill: Callable[..., Any], run: Path
) -> None:
    teacher = make_teacher(hidden_bytes=0)
    plan = plan_of(teacher, rows={"general": 4})
    fill(tmp_path / "begun", teacher, plan, num_units=0)
    assert write_report(tmp_path / "begun", tmp_path / "x.html").num_charts == 0
    assert "0 of 1 units committed" in (tmp_path / "x.html").read_text(encoding="utf-8")
    fill(tmp_path / "no-hidden", teacher, plan)
    assert write_report(tmp_path / "no-hidden", tmp_path / "x.html").num_charts == 4
    lines = [
        step(1, 1) | {"losses": {"total": 0.0}, "weights": {"kl": 0.5, "ce": 0.25}},
        {"kind": "sampling", "step": 1, "weights": {"general": 1.0}},
        ["no line"],
    ]
    (run / "stage1" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_report(run / "stage1", tmp_path / "x.html").num_charts == 4  # losses, learning rate, weights, sampling
