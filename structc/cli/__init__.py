"""The command line. Nothing here but arguments, printing and exit codes."""

from __future__ import annotations

from typing import Annotated

import typer

import structc
from structc.cli import bench, cache, check, convert, doctor, tune
from structc.cli.session import MEANINGS
from structc.settings import VARIABLES

EPILOG = "\n\n".join(
    [
        f"Exit codes: {MEANINGS}.",
        "Environment:",
        *(f"  {name}: {what}" for name, what in VARIABLES.items()),
    ]
)

app = typer.Typer(
    name="structc",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in (
    convert.inspect,
    convert.convert,
    check.verify,
    check.report,
    bench.bench,
    tune.tune,
    doctor.doctor,
):
    app.command()(function)
app.add_typer(cache.app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"structc {structc.__version__}")
        raise typer.Exit


@app.callback(epilog=EPILOG)
def structc_(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Rewrite trained PyTorch models into fast structured forms: measured, verified, explained.

    \b
    Examples:
      structc inspect model.py:make
      structc convert model.py:make -o out --budget max_drop=1%
      structc verify out --against model.py:make
    """


def main() -> None:
    """The console script."""
    app(prog_name="structc")
