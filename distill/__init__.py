"""distill: cache a teacher's targets once, train any number of students from them."""

__version__ = "0.1.0"
