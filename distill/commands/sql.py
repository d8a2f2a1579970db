"""``distill sql``."""

import csv
import sys
from itertools import islice
from typing import Annotated

import typer

from distill.commands.options import CachePath, Json, print_json
from distill.errors import UsageError


def command(
    cache: CachePath,
    sql: Annotated[str, typer.Argument(metavar="SQL", help='A query, such as "select domain, count(*) from rows …".')],
    *,
    limit: Annotated[int, typer.Option(help="Rows that a table shows; --csv and --json give all.")] = 100,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the result as CSV.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a cache in SQL: the views are rows, tokens, vocabulary and rejects. Needs the extra `sql`.

    Example: distill sql cache "select domain, avg(entropy) from tokens where trained group by domain"
    """
    from distill.report.render import render_rows
    from distill.report.sql import plain, query

    if as_csv and as_json:
        raise UsageError("--csv and --json contradict each other. Give one of them.")
    answer = query(cache, sql)
    if as_json:
        rows = [dict(zip(answer.columns, map(plain, row), strict=True)) for row in answer.rows]
        print_json({"columns": list(answer.columns), "rows": rows})
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows([plain(value) for value in row] for row in answer.rows)
    else:
        shown = list(islice(answer.rows, max(limit, 0)))
        render_rows(answer.columns, shown, more=next(answer.rows, None) is not None)
