"""Units cover every input row exactly once."""

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache.plan import Source, plan_units


def source(num_rows: int, domain: str = "general") -> Source:
    return Source(domain=domain, path="x.jsonl", sha256="0" * 64, num_rows=num_rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=5), st.integers(1, 20))
def test_every_row_is_in_one_unit(sizes: list[int], unit_rows: int) -> None:
    units = plan_units([source(size) for size in sizes], unit_rows)
    rows = [(unit.source, row) for unit in units for row in range(unit.start, unit.stop)]
    assert rows == [(index, row) for index, size in enumerate(sizes) for row in range(size)]
    assert all(unit.num_input_rows <= unit_rows for unit in units)
    assert [unit.unit for unit in units] == [f"{number:05d}" for number in range(len(units))]


def test_names_sort_as_numbers_however_many_there_are() -> None:
    units = plan_units([source(100_001)], 1)
    assert units[0].unit == "000000"
    assert units[-1].unit == "100000"


def test_units_inherit_domain_and_split() -> None:
    held_out = Source(domain="medical", path="y.jsonl", sha256="1" * 64, num_rows=2, split="eval")
    units = plan_units([source(1), held_out], 8)
    assert [(unit.domain, unit.split) for unit in units] == [("general", None), ("medical", "eval")]
