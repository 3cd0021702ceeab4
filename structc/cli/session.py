"""What every command shares: where things are printed, how it ends, and with which exit code.

A command is a function that returns an :class:`Answer`. Data go to standard output, everything else
to standard error, also what the user's own model prints while it runs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from structc import settings
from structc.errors import (
    ArtifactCorrupt,
    ArtifactMismatch,
    ArtifactVersion,
    BudgetNotMet,
    CalibrationError,
    CaptureError,
    ConfigError,
    Interrupted,
    ResumeMismatch,
    StructcError,
    UnsupportedModel,
    VerificationFailed,
)
from structc.progress import console

if TYPE_CHECKING:
    from structc.report import Report

log = logging.getLogger("structc")

EXIT_CODES: dict[type[StructcError], int] = {
    ConfigError: 2,
    CalibrationError: 2,
    CaptureError: 2,
    ResumeMismatch: 2,
    UnsupportedModel: 2,
    BudgetNotMet: 3,
    VerificationFailed: 4,
    ArtifactCorrupt: 4,
    ArtifactMismatch: 4,
    ArtifactVersion: 4,
    Interrupted: 5,
}
"""Of an error that ends a command; 1 for all others."""
MEANINGS = (
    "0 done; 1 unexpected; 2 usage; 3 budget not met (the best result is saved); "
    "4 verification failed, or an artifact is corrupt or of another model; "
    "5 interrupted, the same command continues"
)


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Attributes:
        data: for ``--json``.
        shown: for people: a report, or text.
        more: text after the report.
        error: printed after the answer; its class is the exit code.
    """

    data: Any
    shown: Report | str
    more: str = ""
    error: StructcError | None = None


def command(function: Callable[..., Answer]) -> Callable[..., None]:
    """Run a command: print its answer, turn errors into a message and an exit code."""

    @functools.wraps(function)
    def run(**given: Any) -> None:
        out = sys.stdout
        try:
            _set_up_logging(verbose=given["verbose"])
            with contextlib.redirect_stdout(sys.stderr):
                answer = function(**given)
                printed = _printable(answer, out, as_json=given.get("as_json", False))
            print(printed, file=out)
            if answer.error is not None:
                raise typer.Exit(_failed(answer.error))
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(_failed(Interrupted("interrupted"))) from None
        except StructcError as e:
            raise typer.Exit(_failed(e)) from None
        except Exception as e:
            raise typer.Exit(_unexpected(e)) from None

    return run


def note(text: str) -> None:
    """A sentence on standard error."""
    print(f"structc: {one_paragraph(text)}", file=sys.stderr)


def one_paragraph(text: str) -> str:
    """Text without terminal escapes, control and direction characters; lines stay lines."""
    from structc.report.words import clean

    lines = str(text).split("\n")
    return "\n".join(" " * (len(x) - len(x.lstrip(" "))) + str(clean(x)) for x in lines)


# ---------------------------------------------------------------------------- the answer


def _printable(answer: Answer, out: Any, *, as_json: bool) -> str:
    if as_json:
        from structc.report.data import plain

        return json.dumps(plain(answer.data), indent=1, allow_nan=False)
    shown = answer.shown if isinstance(answer.shown, str) else _report(answer.shown, out)
    text = f"{shown.rstrip()}\n\n{answer.more}" if answer.more else shown.rstrip()
    encoding = getattr(out, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _report(report: Report, out: Any) -> str:
    """The report: in colour on a terminal that has some, else as plain text."""
    from structc.report.text import to_text

    encoding = getattr(out, "encoding", None) or "utf-8"
    if not out.isatty() or encoding.lower() not in ("utf-8", "utf8"):
        return to_text(report.to_dict(), encoding=encoding)
    from rich.console import Console

    console = Console(file=out)
    with console.capture() as captured:
        report.print_to(console)
    return captured.get()


# ---------------------------------------------------------------------------- errors


def _failed(error: StructcError) -> int:
    name = type(error).__name__
    print(f"structc: {name}: {one_paragraph(str(error))}", file=sys.stderr)
    if log.isEnabledFor(logging.DEBUG):
        traceback.print_exception(error, file=sys.stderr)
    codes = (code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    return next(codes, 1)


def _unexpected(error: Exception) -> int:
    lines = one_paragraph(str(error)).splitlines()
    first = lines[0] if lines else "no message"
    print(
        f"structc: unexpected {type(error).__name__}: {first} (-v shows where; please report it)",
        file=sys.stderr,
    )
    if log.isEnabledFor(logging.DEBUG):
        traceback.print_exception(error, file=sys.stderr)
    return 1


# ---------------------------------------------------------------------------- log


def _set_up_logging(*, verbose: bool) -> None:
    from rich.logging import RichHandler

    level = "debug" if verbose else settings.current().log
    for old in [h for h in log.handlers if isinstance(h, RichHandler)]:
        log.removeHandler(old)
    handler = RichHandler(console=console(), show_path=False, rich_tracebacks=False, markup=False)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s", datefmt="%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(level.upper())
