"""A report shows well in a real browser: every chart, light and dark, on a phone, and each token that is chosen.

The browser is chromium where the machine has it; nothing is downloaded, and without it these tests are skipped.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

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
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, Debian's package of that name")


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The document as a browser ends up with it, and what its console said."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measured(page: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """Sizes and colours of a page on a phone."""
    script = """
        const inner = document.querySelector("iframe").contentDocument, root = inner.documentElement;
        const drawn = [...inner.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
        const text = inner.querySelector("svg text").getBoundingClientRect().height;
        return {overflow: root.scrollWidth - root.clientWidth, text,
            widest: Math.max(...drawn.map(box => box.right)), flattest: Math.min(...drawn.map(box => box.height)),
            ground: inner.defaultView.getComputedStyle(inner.body).backgroundColor};"""
    found: dict[str, Any] = asked(page, folder, script, *flags)
    return found


def asked(page: Path, folder: Path, script: str, *flags: str) -> Any:
    """What the body of a function returns in a document around the page, which is in a frame as wide as a phone."""
    source = html.escape(page.read_text(encoding="utf-8"))
    frame = f'<iframe style="width:390px;height:900px" srcdoc="{source}"></iframe>'
    runner = f"<script>onload = () => {{ document.title = JSON.stringify((() => {{{script}}})()); }}</script>"
    outer = folder / "outer.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8><title></title>{frame}{runner}", encoding="utf-8")
    document, _ = browse(outer, folder / "profile", *flags)
    return json.loads(html.unescape(re.findall("<title>(.*?)</title>", document, re.DOTALL)[0]))


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


def test_the_browser_test_would_notice_a_request(run: Path, tmp_path: Path) -> None:
    write_report(run, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(text.replace("<footer>", '<img src="http://127.0.0.1:9/x.png"><footer>'))
    _, console = browse(tmp_path / "page.html", tmp_path / "profile")
    assert any("Content Security Policy" in line for line in console)


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


def test_a_phone_shows_answers_below_their_prompt(run: Path, tmp_path: Path) -> None:
    said = {"step": 4, "domain": "medical", "prompt": "Why?", "student": "so " * 90, "reference": "x" * 300}
    (run / "stage1" / "samples.jsonl").write_text(json.dumps(said | {"author": "teacher"}) + "\n")
    write_report(run, tmp_path / "page.html")
    script = """
        const inner = document.querySelector("iframe").contentDocument;
        const drawn = [...inner.querySelectorAll(".texts td")].map(cell => cell.getBoundingClientRect());
        return {right: Math.max(...drawn.map(box => box.right)), seen: drawn.filter(box => box.height > 0).length};"""
    found = asked(tmp_path / "page.html", tmp_path, script)
    assert found["right"] <= 390
    assert found["seen"] == 6  # domain, prompt, twice who and what; nothing is left of cells that repeat


def test_a_chosen_token_shows_what_both_expected(run: Path, tmp_path: Path) -> None:
    """By mouse and by keyboard; hostile text stays text; marks do not rest on colour alone."""
    write_report(run, tmp_path / "page.html")
    script = """
        const inner = document.querySelector("iframe").contentDocument;
        const section = inner.querySelector(".sequence"), panel = section.querySelector(".panel");
        const buttons = [...section.querySelectorAll("button")], look = inner.defaultView.getComputedStyle;
        const state = () => ({tables: [...panel.querySelectorAll("table")].map(table => table.innerText),
            pressed: buttons.map(button => button.getAttribute("aria-pressed")),
            reachable: buttons.map(button => button.tabIndex), focused: buttons.indexOf(inner.activeElement)});
        const found = {at_first: state(), names: buttons.map(button => button.textContent)};
        buttons[1].focus(); buttons[1].click();
        found.clicked = state();
        const press = key => inner.activeElement.dispatchEvent(
            new inner.defaultView.KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
        press("ArrowRight"); press("ArrowRight");
        found.right = state();
        press("Home");
        found.home = state();
        found.underlines = buttons.map(button => look(button).borderBottomStyle + look(button).borderBottomColor);
        found.bold = inner.querySelectorAll("section b").length;
        return found;"""
    found = asked(tmp_path / "page.html", tmp_path, script)
    assert found["names"] == [" yes", "</script><b>no</b>", "↵医"]
    assert found["at_first"]["pressed"] == ["true", "false", "false"]  # the first where the two differ
    teacher, student = found["clicked"]["tables"]
    assert teacher.split("\n")[0].strip() == "Teacher"
    assert re.findall(r"[\d.]+%", teacher) == ["50.0%", "25.0%", "12.5%", "12.5%"]
    assert "</script><b>no</b> ✓ came" in teacher
    assert "outside the top-k" in teacher
    assert re.findall(r"[\d.]+%", student) == ["50.0%", "25.0%", "25.0%"]
    assert found["clicked"]["pressed"] == ["false", "true", "false"]
    assert found["clicked"]["reachable"] == [-1, 0, -1]
    assert found["right"]["focused"] == 2  # and stays at the end
    assert "✓ came" not in "".join(found["right"]["tables"])
    assert found["home"]["focused"] == 0
    assert re.findall(r"[\d.]+%", found["home"]["tables"][1]) == ["75.0%", "12.5%", "12.5%"]
    assert [style.split("rgb")[0] for style in found["underlines"]] == ["dashed", "solid", "dashed"]


def test_the_teacher_alone_stands_on_the_page_of_a_cache(cache: Path, tmp_path: Path) -> None:
    write_report(cache, tmp_path / "page.html")
    script = """
        const inner = document.querySelector("iframe").contentDocument;
        return [...inner.querySelectorAll(".panel")].map(panel => panel.innerText);"""
    panels = asked(tmp_path / "page.html", tmp_path, script)
    assert panels
    assert all("Teacher" in panel and "outside the top-k" in panel and "Student" not in panel for panel in panels)


def test_without_scripts_the_page_says_so(run: Path, tmp_path: Path) -> None:
    write_report(run, tmp_path / "page.html")
    script = 'return document.querySelector("iframe").contentDocument.querySelector("noscript").innerText;'
    assert "needs scripts" in str(asked(tmp_path / "page.html", tmp_path, script))
