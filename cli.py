"""Run the command line from a checkout: ``python cli.py cache-teacher …`` is ``distill cache-teacher …``."""

from distill.__main__ import main

if __name__ == "__main__":
    main()
