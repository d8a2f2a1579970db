"""Record files are plain JSON, and no flipped bit in one goes unseen."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill.cache import document
from distill.cache.plan import Plan
from distill.errors import CorruptionError


def parse(data: bytes) -> Plan:
    return document.parse(Plan, data, path=Path("cache/plan.json"), fix="Restore it.")


def test_round_trip_as_plain_json(teacher: Any, plan_of: Any) -> None:
    plan = plan_of(teacher, rows={"医学": 5})
    data = document.render(plan)
    assert parse(data) == plan
    assert "医学" in data.decode()
    assert list(json.loads(data))[-1] == "checksum"


def test_every_flipped_bit_is_seen(teacher: Any, plan_of: Any) -> None:
    data = document.render(plan_of(teacher, rows={"general": 3}))
    for index in range(len(data)):
        for bit in (0, 3, 5, 6):
            flipped = bytearray(data)
            flipped[index] ^= 1 << bit
            with pytest.raises(CorruptionError):
                parse(bytes(flipped))


def test_truncated_extended_or_foreign_files_are_refused(teacher: Any, plan_of: Any) -> None:
    data = document.render(plan_of(teacher, rows={"general": 3}))
    for damaged in (b"", b"{}", data[:-1], data + b"\n", data[10:], b"\0" * len(data)):
        with pytest.raises(CorruptionError, match=r"cache/plan\.json is damaged.* Restore it\."):
            parse(damaged)


def test_unknown_members_are_refused_by_name(teacher: Any, plan_of: Any) -> None:
    plan = plan_of(teacher, rows={"general": 3})

    class Longer(Plan):
        surprise: int = 1

    longer = Longer(**{name: getattr(plan, name) for name in Plan.model_fields})
    with pytest.raises(CorruptionError, match=r"not a plan: 'surprise'"):
        parse(document.render(longer))
