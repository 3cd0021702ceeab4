"""Bars on standard error while something takes long."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def console() -> Console:
    """The one console on standard error, so that bars and log lines keep clear of each other."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


_NEXT = {"price": "profile", "fit": "bind kernels", "select": "rewrite, verify, time"}
"""What goes on, unseen, after a stage that shows its progress."""


@contextlib.contextmanager
def progress_bars(
    *, wanted: bool, first: str = "load, capture, detect"
) -> Iterator[Callable[[str, int, int], None]]:
    """A function for ``progress=`` that draws one bar a stage; it draws none without a terminal."""
    if not wanted or not _is_terminal(sys.stderr):
        yield lambda stage, done, total: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=console(),
        transient=True,
        refresh_per_second=2,  # kernels are timed in this process, too
        redirect_stdout=_is_terminal(sys.stdout),  # what the user prints stays where it goes
    ) as bars:
        task, current = bars.add_task(first, total=None), ""

        def report(stage: str, done: int, total: int) -> None:
            nonlocal task, current
            if stage != current:
                bars.remove_task(task)
                task, current = bars.add_task(stage, total=total), stage
            bars.update(task, completed=done, total=total)
            if done >= total and stage in _NEXT:
                bars.remove_task(task)
                task, current = bars.add_task(_NEXT[stage], total=None), ""

        yield report


def named(progress: Callable[[str, int, int], None], name: str) -> Callable[[str, int, int], None]:
    """The same function for work whose items are one stage to whoever looks on."""
    return lambda _, done, total: progress(name, done, total)


def _is_terminal(stream: object) -> bool:
    """Whether bars may be drawn there: a stream may be closed, missing or somebody's own."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        return False
