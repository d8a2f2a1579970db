"""Progress without a terminal: a line at an interval, also from a job that hangs.

What it protects: what people read in a job's log, by which they kill it or let it run.
"""

import io
import re
import sys
import threading
import time

import pytest

from distill.progress import Ticker


def test_a_line_tells_facts_memory_stalls_and_the_time_left() -> None:
    ticker = Ticker("stage 1", total=110, start=10)
    assert ticker.line(time.monotonic()).endswith("stalls 0  ETA unknown")
    ticker.update(60, tokens_per_s=1234.5, rejects=2)
    line = ticker.line(ticker._began + 20)
    pattern = r"stage 1: 60/110  tokens_per_s 1,23\d  rejects 2  memory \d+\.\d GB  stalls 0  ETA 0:00:20"
    assert re.fullmatch(pattern, line), line  # the ten that were done before took this process no time
    assert "nothing new for 40 s" in ticker.line(ticker._moved + 40)


def test_a_job_that_hangs_still_prints_a_line_and_counts_the_stall(capsys: pytest.CaptureFixture[str]) -> None:
    text, deadline = "", time.monotonic() + 20
    with Ticker("cache-teacher", total=4, interval_s=0.01) as ticker:
        ticker.update(1, tokens=7)
        while "stalls 2" not in text and time.monotonic() < deadline:
            threading.Event().wait(0.01)
            text += capsys.readouterr().err
    assert "cache-teacher: 1/4  tokens 7  memory" in text
    assert "stalls 2  nothing new for 0 s  ETA" in text


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_a_narrow_terminal_cuts_the_facts_before_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", Screen())
    with Ticker("stage 1", total=9000) as ticker:
        ticker.update(4500, loss=5.995, tokens_per_s=12345.6, held_out="general 1.2345, medical 2.3456")
    assert isinstance(sys.stderr, Screen)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sys.stderr.getvalue())
    assert re.search(r"stage 1 ━{10}[^\n]* 4500/9000 (\d+:\d\d:\d\d|-:--:--) loss 5.995  tokens_per_s", shown), shown


def test_quiet_prints_nothing_and_starts_no_thread(capsys: pytest.CaptureFixture[str]) -> None:
    with Ticker("plan", total=2, quiet=True, interval_s=0.001) as ticker:
        ticker.update(2)
        ticker.show("between")
        assert "progress" not in {thread.name for thread in threading.enumerate()}
    assert capsys.readouterr().err == ""
