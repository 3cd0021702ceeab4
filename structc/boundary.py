"""What may leave the public API: structc's own errors, and nothing else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from structc.errors import InternalError, Interrupted, StructcError

_asked = threading.Event()


@contextmanager
def public_boundary(work_dir: Path | None = None) -> Iterator[None]:
    """Only StructcError and its children leave; a broken promise of ours says so."""
    try:
        with _ctrl_c_is_kept():
            yield
    except StructcError:
        raise
    except KeyboardInterrupt:
        if work_dir is None:
            raise
        raise Interrupted(
            f"interrupted; finished work is kept in {work_dir}",
            hint="Run the same command again to continue.",
        ) from None
    except MemoryError:
        raise
    except Exception as e:
        raise InternalError(
            f"structc broke a promise of its own: {type(e).__name__}: {e}",
            hint="Please report this with the model's class and the full traceback.",
        ) from e


@contextmanager
def _ctrl_c_is_kept() -> Iterator[None]:
    """Remember Ctrl-C: raised inside a destructor or a library's callback, Python drops it.

    Only where Python's own handler is in place, and in the main thread, which alone gets signals.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        _asked.set()
        signal.default_int_handler(number, frame)

    _asked.clear()
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        _asked.clear()
        if signal.getsignal(signal.SIGINT) is handle:  # user code may have put in its own
            signal.signal(signal.SIGINT, signal.default_int_handler)


def check_interrupt() -> None:
    """Raise a KeyboardInterrupt that was dropped on its way; called where a stage ends."""
    if _asked.is_set() and threading.current_thread() is threading.main_thread():
        _asked.clear()
        raise KeyboardInterrupt
