"""The tiny teacher, student and cache of the students' tests."""

from tests.student import conftest as student_fixtures

world = student_fixtures.world
bare_cache = student_fixtures.bare_cache
