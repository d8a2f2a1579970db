"""The tiny teacher, student and cache of the student's tests, for commands to work on."""

from tests.student import conftest as student_fixtures

world = student_fixtures.world
