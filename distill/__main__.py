"""The command line: the commands of ``distill.commands`` under one name, and errors as exit codes.

Errors that are the user's to fix come out as one paragraph on standard error with a fixed exit code (see
``distill.errors``), never as a traceback.
"""

import io
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
from distill.commands.options import Plain
from distill.errors import DistillError

app = typer.Typer(
    name="distill",
    help="Cache a teacher's targets once, train any number of students from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_CTRL_C = 130
_PREPARE, _DISTILL, _LOOK, _KEEP = "Prepare", "Distill", "Look in", "Keep in order"
app.command("init", cls=Plain, rich_help_panel=_PREPARE)(init.command)
app.command("doctor", cls=Plain, rich_help_panel=_PREPARE)(doctor.command)
app.command("plan", cls=Plain, rich_help_panel=_PREPARE)(plan.command)
app.command("launch", cls=Plain, rich_help_panel=_PREPARE)(launch.command)
app.command("cache-teacher", cls=Plain, rich_help_panel=_DISTILL)(cache_teacher.command)
app.command("train", cls=Plain, rich_help_panel=_DISTILL)(train.command)
app.command("eval", cls=Plain, rich_help_panel=_DISTILL)(evaluate.command)
app.command("export", cls=Plain, rich_help_panel=_DISTILL)(export.command)
app.command("inspect", cls=Plain, rich_help_panel=_LOOK)(inspect.command)
app.command("report", cls=Plain, rich_help_panel=_LOOK)(report.command)
app.command("sql", cls=Plain, rich_help_panel=_LOOK)(sql.command)
app.command("diff", cls=Plain, rich_help_panel=_LOOK)(diff.command)
app.command("status", cls=Plain, rich_help_panel=_KEEP)(status.command)
app.command("verify", cls=Plain, rich_help_panel=_KEEP)(verify.command)
app.command("gc", cls=Plain, rich_help_panel=_KEEP)(gc.command)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no "●" shows "?"
    try:
        app()
    except DistillError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as done:
        if done.code == _CTRL_C:
            print("Stopped. The same command goes on from what was saved.", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
