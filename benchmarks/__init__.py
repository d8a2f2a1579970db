"""Programs that measure; each prints a table and, with ``--json FILE``, writes its numbers."""
