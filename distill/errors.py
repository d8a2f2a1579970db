"""The errors a user can meet, each with its exit code.

A message is one paragraph that says what is wrong, where, why, and how to fix it. The command line prints it
and exits with ``exit_code``; a library user catches ``DistillError`` or one of its children.
"""


class DistillError(Exception):
    """Base of every error that is the user's, the data's or the machine's, not a bug of ours."""

    exit_code = 1


class UsageError(DistillError, ValueError):
    """An option or a configuration key is missing, unknown or makes no sense (exit 2)."""

    exit_code = 2


class DataError(DistillError, ValueError):
    """Input data, or a cache that is incomplete, cannot be used (exit 3)."""

    exit_code = 3


class IdentityError(DistillError, ValueError):
    """Two things that must agree do not: teacher, tokenizer, temperature, targets (exit 4)."""

    exit_code = 4


class CorruptionError(DistillError, ValueError):
    """Bytes are not the bytes that were committed (exit 5)."""

    exit_code = 5


class StorageError(DistillError, OSError):
    """The disk or store refused: full, read-only, missing (exit 6)."""

    exit_code = 6


class RetryError(DistillError, RuntimeError):
    """Something died that a second run may survive: engine, store, preemption (exit 75)."""

    exit_code = 75


class EngineError(RetryError):
    """The teacher's engine died while it worked; it may be loaded again at once (exit 75)."""
