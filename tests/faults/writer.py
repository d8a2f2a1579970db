"""One writer in a process of its own: ``python -m tests.faults.writer ROOT NUM_ROWS``; exits as ``distill`` does."""

import sys
from pathlib import Path

from distill.errors import DistillError
from distill.launch.worker import Worker
from tests.faults.filler import Job, fill_cache


def main() -> int:
    """Fill and seal the cache at ROOT."""
    try:
        fill_cache(Path(sys.argv[1]), Job.make(num_rows=int(sys.argv[2])), Worker())
    except DistillError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
