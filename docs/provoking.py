"""A run of the tests flows in, which test provokes which error flows out, into docs/provoked.json.

    python -m pytest -p docs.provoking tests/cache tests/data
    python -m docs.errors

An error is told by the line that made it, or, where pydantic carries it, by its words. A test that is recorded stays
the error's until it is gone. What tests do in processes of their own is not seen: name those in ``errors.BY_PROCESS``.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from distill.errors import DistillError
from docs import errors


@contextlib.contextmanager
def recording(found: dict[str, str]) -> Iterator[None]:
    """Puts the key of each error that is made meanwhile into ``found``, with the test that runs, the first to come."""
    sites = {(site.module, line): site.key for site in errors.every_site() for line in site.lines}
    carried = [(site.key, _pattern(site.text)) for site in errors.every_site() if site.carried]

    def note(frame: FrameType, message: str) -> None:
        test = re.sub(r"(\[.*)? \(\w+\)$", "", os.environ.get("PYTEST_CURRENT_TEST", ""))
        module = frame.f_code.co_filename.rpartition(f"{errors.PACKAGE.name}/")[2]
        keys = [sites[module, frame.f_lineno]] if (module, frame.f_lineno) in sites else []
        keys += [key for key, pattern in carried if module == "config.py" and pattern.search(message)]
        for key in keys:
            found.setdefault(key, test)

    def begun(self: DistillError, *arguments: Any) -> None:
        note(sys._getframe(1), " ".join(map(str, arguments)))
        super(DistillError, self).__init__(*arguments)

    DistillError.__init__ = begun  # type: ignore[method-assign]
    try:
        yield
    finally:
        del DistillError.__init__


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(".+".join(map(re.escape, text.split("…"))))


def merged(known: dict[str, str], found: dict[str, str]) -> dict[str, str]:
    """Both, as far as errors and tests exist; what was known goes first."""
    keys = {site.key for site in errors.sites()}
    both = {**found, **{key: test for key, test in known.items() if errors.exists(test)}}
    return {key: test for key, test in sorted(both.items()) if key in keys and test}


def pytest_configure(config: pytest.Config) -> None:
    """Records while the session lasts."""
    if hasattr(config, "workerinput"):
        raise pytest.UsageError("docs.provoking records one process: leave -n away.")
    found: dict[str, str] = {}
    stack = contextlib.ExitStack()
    stack.enter_context(recording(found))
    config.add_cleanup(lambda: _end(stack, found))


def _end(stack: contextlib.ExitStack, found: dict[str, str]) -> None:
    stack.close()
    known = merged(errors.provoked(), found)
    errors.RECORD.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
