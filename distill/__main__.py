"""The command line: the commands of ``distill.commands`` under one name, and errors as exit codes.

Errors that are the user's to fix come out as one paragraph on standard error with a fixed exit code (see
``distill.errors``), never as a traceback.
"""

import sys
from typing import Annotated

import typer

from distill import __version__
from distill.commands import (
    cache_teacher,
    diff,
    doctor,
    export,
    gc,
    init,
    inspect,
    launch,
    plan,
    report,
    sql,
    status,
    train,
    verify,
)
from distill.commands import eval as evaluate
from distill.errors import DistillError

app = typer.Typer(
    name="distill",
    help="Cache a teacher's targets once, train any number of students from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(init.command)
app.command("plan")(plan.command)
app.command("cache-teacher")(cache_teacher.command)
app.command("train")(train.command)
app.command("eval")(evaluate.command)
app.command("export")(export.command)
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("status")(status.command)
app.command("gc")(gc.command)
app.command("diff")(diff.command)
app.command("doctor")(doctor.command)
app.command("launch")(launch.command)
app.command("report")(report.command)
app.command("sql")(sql.command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"distill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of ``distill``: runs a command and turns the errors of ``distill.errors`` into exit codes."""
    try:
        app()
    except DistillError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
