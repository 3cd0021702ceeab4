"""One row of ``structc bench triton`` before it is compiled."""

from __future__ import annotations

from dataclasses import dataclass

from structc.codegen.triton.aot import Job
from structc.codegen.triton.config import Config


@dataclass(frozen=True)
class Entry:
    """One kernel to be compiled.

    Attributes:
        case: the program, for people.
        kind: of the kernel: ``"panel"``, ``"norm"``, ...
        config: how it is cut up.
        chosen: whether that is the default.
        job: for the compiler.
        predicted: seconds of the stage, by the cost model; None where it has no room, or for what
            follows a product.
    """

    case: str
    kind: str
    config: Config
    chosen: bool
    job: Job
    predicted: float | None
