"""What may leave the public API: structc's own errors, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from structc.errors import InternalError, Interrupted, StructcError


@contextmanager
def public_boundary(work_dir: Path | None = None) -> Iterator[None]:
    """Only StructcError and its children leave; a broken promise of ours says so."""
    try:
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
