"""A kernel that does not compile or finds no room is recorded, and the next way is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Way = TypeVar("Way")
T = TypeVar("T")
_log = logging.getLogger("structc")
_failures: list[Failure] = []


@dataclass(frozen=True)
class Failure:
    """One way that did not run.

    Attributes:
        what: the operator.
        way: its plan or config.
        reason: what Triton said.
    """

    what: str
    way: str
    reason: str


@dataclass
class Attempts(Generic[Way]):
    """Ways to run one thing, the best first; what fails is not tried again.

    Attributes:
        what: the operator, for people.
        ways: what is left of them.
    """

    what: str
    ways: list[Way] = field(default_factory=list)

    def run(self, call: Callable[[Way], T]) -> T | None:
        """What the first way that runs gives; None where none is left.

        Errors: out of memory is the caller's; whatever else a way raises is recorded.
        """
        import torch

        while self.ways:
            way = self.ways[0]
            try:
                return call(way)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # whatever the compiler or the driver raises
                text = " ".join(f"{type(e).__name__}: {e}".split())[:400]
                _failures.append(Failure(self.what, str(way), text))
                _log.warning("%s does not run as %s: %s", self.what, way, text)
                self.ways.pop(0)
        return None


@dataclass
class Tuned(Generic[Way]):
    """Ways that a bundle brought.

    Attributes:
        ways: the best first.
        open: whether the first call times them, on its own inputs, and puts them in order.
    """

    ways: tuple[Way, ...]
    open: bool = False

    def settle(self, attempts: Attempts[T], call: Callable[[T], object]) -> None:
        """Put the ways in front of ``attempts``, which are these, in order, once."""
        from structc.codegen.triton import timing

        if self.open:
            self.open = False
            many = len(self.ways)
            attempts.ways[:many] = timing.ordered(attempts.ways[:many], call)


def failures() -> tuple[Failure, ...]:
    """What did not run in this process so far."""
    return tuple(_failures)
