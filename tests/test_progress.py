"""Progress without a terminal: a line at an interval, also from a job that hangs.

What it protects: what people read in a job's log, by which they kill it or let it run.
"""

import re
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


def test_quiet_prints_nothing_and_starts_no_thread(capsys: pytest.CaptureFixture[str]) -> None:
    with Ticker("plan", total=2, quiet=True, interval_s=0.001) as ticker:
        ticker.update(2)
        ticker.show("between")
        assert "progress" not in {thread.name for thread in threading.enumerate()}
    assert capsys.readouterr().err == ""
