"""A report tells a cache's and a run's numbers, is one file that loads nothing, and shows well in a real browser."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.cache.reader import CacheReader
from distill.errors import CorruptionError, DataError, UsageError
from distill.records import Reject
from distill.report import curves
from distill.report.distributions import sample
from distill.report.html import write_report

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--timeout=20000",
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, Debian's package of that name")


@pytest.fixture
def rejecting_cache(tmp_path: Path, teacher: Any, plan_of: Callable[..., Any], fill: Callable[..., Any]) -> Path:
    """A sealed cache with hostile names and three rejects of two reasons."""
    plan = plan_of(teacher, rows={"general": 4, "<b>$x_1$ 医学</b>": 4})
    root = tmp_path / "rejecting"
    writer = fill(root, teacher, plan, num_units=1)
    unit = plan.units[1]
    reasons = ("row has 3,001 tokens", "row has 17 tokens", "no <script>answer</script>")
    rejects = [Reject(domain=unit.domain, source=f"m.jsonl:{i}", reason=text) for i, text in enumerate(reasons)]
    rows = [teacher.sequence(3, domain=unit.domain, source="m.jsonl:3")]
    writer.commit(unit, rows, rejects=rejects, num_input_rows=4)
    writer.seal()
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three stages of four steps with two evaluations each, the last line of the last torn."""
    root = tmp_path / "run"
    for number, temperature in ((1, 4.0), (2, 2.0), (3, 1.0)):
        folder = root / f"stage{number}"
        folder.mkdir(parents=True)
        lines = [evaluation(0, temperature), *(step(i, number) for i in range(1, 5)), evaluation(4, temperature)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (root / "stage3" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    return root


def evaluation(step: int, temperature: float) -> dict[str, Any]:
    kl = {str(T): 2.0 / (1 + step) for T in {temperature, 1.0}}
    figures = {"kl": kl, "ce": 3.0 - step / 10, "top1_agreement": 0.25 + step / 100, "feature": None}
    domains = {"general": figures, "medical": figures}
    return {"kind": "eval", "step": step, "time": 1.0, "objective": 1.0, "domains": domains, "overall": figures}


def step(number: int, stage: int) -> dict[str, Any]:
    shares = {domain: {"realised": 0.5, "scheduled": 0.4} for domain in ("general", "medical")}
    losses = {"total": 2.0 / number, "kl": 1.0, "ce": 3.0} | ({"feature": 0.5} if stage == 2 else {})
    return {"kind": "train", "step": number, "losses": losses, "lr": 1e-4, "grad_norm": None, "tokens": 100} | (
        {"shares": shares, "grad_norm": 1.5} if number > 1 else {}
    )


def test_the_page_of_a_cache_says_what_the_cache_holds(cache: Path, tmp_path: Path) -> None:
    report = write_report(cache, tmp_path / "new" / "cache.html")
    text = (tmp_path / "new" / "cache.html").read_text(encoding="utf-8")
    assert (report.about, report.num_charts, report.num_bytes) == ("cache", 5, len(text.encode()))
    assert text.count('<svg role="img"') == 5
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
    assert "<script" not in text
    assert html.escape("<b>$x_1$ 医学</b>") in text


def test_the_page_of_a_run_joins_its_stages_on_one_axis(run: Path, tmp_path: Path) -> None:
    report = write_report(run, tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert report.about == "run"
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    assert titles == [
        "Training losses",
        "Learning rate",
        "Gradient norm",
        "Domains&#x27; shares",
        *(f"Held-out KL at T={temperature}" for temperature in (4, 2, 1)),
        "Held-out cross-entropy",
        "Held-out agreement",
    ]
    assert report.num_charts == len(titles)
    read = curves.read_run(run)
    assert [stage.start for stage in read.stages] == [0, 4, 8]
    assert [x for part in read.series["train/losses/total"] for x, _ in part] == list(range(1, 13))
    assert [len(part) for part in read.series["train/losses/feature"]] == [0, 4]
    assert [len(part) for part in read.series["train/grad_norm"]] == [3, 3, 3]


def test_one_stage_is_a_report_too_and_the_same_numbers_are_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first = write_report(run / "stage2", tmp_path / "a.html")
    write_report(run / "stage2", tmp_path / "b.html")
    assert first.about == "run"
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_nothing_in_the_page_is_loaded_from_elsewhere(cache: Path, run: Path, tmp_path: Path) -> None:
    for source in (cache, run):
        write_report(source, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert set(re.findall(r"https?://[^\"'<> ]+", text)) <= namespaces
        assert not re.search(r"<script|@import|url\((?!#)", text)


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


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The document as a browser ends up with it, and what its console said."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measured(page: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """Sizes and colours of a page in a frame as wide as a phone, taken by a script around it."""
    frame = (
        f'<iframe style="width:390px;height:900px" srcdoc="{html.escape(page.read_text(encoding="utf-8"))}"></iframe>'
    )
    script = """<script>onload = () => {
        const inner = document.querySelector("iframe").contentDocument, root = inner.documentElement;
        const drawn = [...inner.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
        const text = inner.querySelector("svg text").getBoundingClientRect().height;
        document.title = JSON.stringify({overflow: root.scrollWidth - root.clientWidth, text,
            widest: Math.max(...drawn.map(box => box.right)), flattest: Math.min(...drawn.map(box => box.height)),
            ground: inner.defaultView.getComputedStyle(inner.body).backgroundColor});
    }</script>"""
    outer = folder / "outer.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8><title></title>{frame}{script}", encoding="utf-8")
    document, _ = browse(outer, folder / "profile", *flags)
    found: dict[str, Any] = json.loads(html.unescape(re.findall("<title>(.*?)</title>", document)[0]))
    return found


@needs_browser
@pytest.mark.parametrize("kind", ["cache", "run"])
def test_a_browser_shows_every_chart_and_complains_of_nothing(
    kind: str, cache: Path, run: Path, tmp_path: Path
) -> None:
    report = write_report(cache if kind == "cache" else run, tmp_path / "page.html")
    document, console = browse(tmp_path / "page.html", tmp_path / "profile")
    # the page's policy turns any request for something else into a line on the console
    assert console == []
    assert document.count("<svg role=") == report.num_charts
    assert document.rstrip().endswith("</html>")


@needs_browser
def test_the_browser_test_would_notice_a_request(run: Path, tmp_path: Path) -> None:
    write_report(run, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(text.replace("<footer>", '<img src="http://127.0.0.1:9/x.png"><footer>'))
    _, console = browse(tmp_path / "page.html", tmp_path / "profile")
    assert any("Content Security Policy" in line for line in console)


@needs_browser
def test_a_phone_shows_it_whole_and_a_dark_one_darkly(rejecting_cache: Path, tmp_path: Path) -> None:
    write_report(rejecting_cache, tmp_path / "page.html")
    light = measured(tmp_path / "page.html", tmp_path)
    dark = measured(tmp_path / "page.html", tmp_path, "--blink-settings=preferredColorScheme=0")
    assert light["overflow"] == dark["overflow"] == 0
    assert light["widest"] <= 390
    assert light["flattest"] > 80
    assert light["text"] >= 9
    assert light["ground"] == "rgb(244, 245, 247)"
    assert dark["ground"] == "rgb(18, 21, 24)"


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
        {"kind": "sampling", "step": 1, "weights": {}},
        ["no line"],
    ]
    (run / "stage1" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_report(run / "stage1", tmp_path / "x.html").num_charts == 3  # losses, learning rate, weights
