"""Every error that leaves the public API. Imports nothing.

A user's mistake raises a child of :class:`StructcError` whose text says *where*, *what was expected
and what came*, *why it matters* and *what to do*. "Does not apply here" is never an exception: it
is a returned :class:`structc.records.Refusal`.
"""

from __future__ import annotations


class StructcError(Exception):
    """Base of all errors that structc raises on purpose.

    Args:
        message: where, expected and got, why.
        hint: what to do about it; appended to the text.
        layer: the name of the module or parameter concerned, if one is.
    """

    code = "STRUCTC"

    def __init__(self, message: str, *, hint: str = "", layer: str = "") -> None:
        super().__init__(message if not hint else f"{message}\n  {hint}")
        self.hint = hint
        self.layer = layer


class ConfigError(StructcError):
    """An argument, option, pattern or budget that makes no sense."""

    code = "CONFIG"


class CalibrationError(StructcError):
    """Calibration data that are missing, empty, non-finite or do not fit the model."""

    code = "CALIBRATION"


class CaptureError(StructcError):
    """The model cannot be run on its example inputs."""

    code = "CAPTURE"


class UnsupportedModel(StructcError):
    """A kind of model that structc refuses as a whole (ScriptModule, meta tensors, DTensor)."""

    code = "UNSUPPORTED"


class BudgetNotMet(StructcError):
    """No plan meets a latency or parameter demand inside the quality budget.

    Attributes:
        result: the best verified model that was found.
    """

    code = "BUDGET"

    def __init__(self, message: str, *, result: object = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.result = result


class VerificationFailed(StructcError):
    """The compiled model does not do what its report promises."""

    code = "VERIFY"


class ArtifactCorrupt(StructcError):
    """A saved artifact is incomplete, altered or not an artifact."""

    code = "ARTIFACT"


class ArtifactVersion(StructcError):
    """A saved artifact was written by a newer schema."""

    code = "ARTIFACT_VERSION"


class ArtifactMismatch(StructcError):
    """A saved artifact belongs to another model."""

    code = "ARTIFACT_MISMATCH"


class ArtifactWrite(StructcError):
    """An artifact cannot be written (disk full, not writable, exists already)."""

    code = "ARTIFACT_WRITE"


class CacheError(StructcError):
    """The tuning database was asked for something it cannot do."""

    code = "CACHE"


class ResumeMismatch(StructcError):
    """A working folder holds the work of another conversion."""

    code = "RESUME"


class Interrupted(StructcError):
    """Ctrl-C during a conversion; the same command continues it."""

    code = "INTERRUPTED"


class InternalError(StructcError):
    """A promise that structc broke itself; please report it."""

    code = "INTERNAL"
