"""Where a conversion writes: checked before any work is done, and cleaned up after it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from structc.errors import ConfigError, Interrupted, ResumeMismatch, StructcError

MANIFEST, WORK_MANIFEST = "structc.json", "manifest.json"
FILES = ("model.safetensors", MANIFEST, "report.json", "report.html")


@dataclass(frozen=True)
class Place:
    """An artifact's folder and the folder of unfinished work beside it."""

    out: Path
    work: Path

    @classmethod
    def checked(cls, out: Path, *, overwrite: bool) -> Place:
        """The place of an artifact that may be written.

        Errors: :class:`ConfigError` if something else is there, or it cannot be written to.
        """
        try:
            named = out.name not in ("", "..")
            # resolving OUT itself would write to where a link points
            target = out.parent.resolve() / out.name if named else out.resolve()
            _check_out(out, target, overwrite=overwrite)
            place = cls(out, target.with_name(f"{target.name}.structc-work"))
            _check_work(place.work)
            _check_parent(target)
        except (OSError, ValueError) as e:
            raise ConfigError(f"OUT {str(out)!r} cannot be used: {e}") from None
        return place

    @property
    def has_work(self) -> bool:
        """Whether there is unfinished work: more than the fingerprint of the options."""
        if not self.work.is_dir():
            return False
        return any(not p.name.startswith((".", WORK_MANIFEST)) for p in self.work.iterdir())

    def start_over(self) -> None:
        """Forget unfinished work."""
        shutil.rmtree(self.work, ignore_errors=True)

    @contextmanager
    def work_in_progress(self) -> Iterator[None]:
        """Keep the folder of unfinished work when it is of use, and only then."""
        try:
            yield
        except ResumeMismatch as e:
            raise ResumeMismatch(
                str(e).split("\n", 1)[0],
                hint="Repeat the command that was interrupted, or start over with --no-resume.",
            ) from None
        except (Interrupted, KeyboardInterrupt):
            if not self.has_work:
                self.start_over()
                raise Interrupted(
                    "interrupted before anything was finished", hint="Run the same command again."
                ) from None
            raise Interrupted(
                f"interrupted; finished work is kept in {self.work}",
                hint="Run the same command again to continue, or add --no-resume to start over.",
            ) from None
        except StructcError:
            if not self.has_work:
                self.start_over()
            raise
        self.start_over()


def _check_out(out: Path, target: Path, *, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(
            f"OUT {str(out)!r} is a {'link' if target.is_symlink() else 'file'}",
            hint="Give the path of a new folder.",
        )
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file():
        raise ConfigError(
            f"OUT {str(out)!r} is a folder with other things in it",
            hint="Give a new or an empty folder; structc replaces its own artifacts only.",
        )
    if not overwrite:
        raise ConfigError(
            f"OUT {str(out)!r} holds an artifact already",
            hint="Add --overwrite to replace it, or give another folder.",
        )


def _check_work(work: Path) -> None:
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise ConfigError(f"{work} is in the way: unfinished work is kept in a folder there")
    if not work.is_dir() or (work / WORK_MANIFEST).is_file():
        return
    if any(not p.name.startswith(f".{WORK_MANIFEST}") for p in work.iterdir()):
        raise ConfigError(
            f"{work} is in the way: it is a folder with other things in it",
            hint="Unfinished work is kept there. Move it, or give another OUT.",
        )


def _check_parent(target: Path) -> None:
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"OUT: {parent} is not a folder that can be written to", hint="Give another folder."
        )
