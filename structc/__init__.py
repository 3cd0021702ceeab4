"""structc: rewrite trained PyTorch models into fast structured forms.

One call, a budget in, a verified faster model and an explanation out:

    fast = structc.compile(model, example_inputs, calibration=batches,
                           budget=structc.Budget(metric=quality, max_drop=0.01))

Importing this package loads neither a compiler nor triton nor rich; names are loaded when used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from structc.errors import (
    ArtifactCorrupt,
    ArtifactMismatch,
    ArtifactVersion,
    ArtifactWrite,
    BudgetNotMet,
    CacheError,
    CalibrationError,
    CaptureError,
    ConfigError,
    InternalError,
    Interrupted,
    ResumeMismatch,
    StructcError,
    UnsupportedModel,
    VerificationFailed,
)

if TYPE_CHECKING:
    from structc import attention, families, metrics
    from structc.budget import Budget
    from structc.built import build
    from structc.bundle import use_bundle
    from structc.compiled import CompiledModel
    from structc.pipeline import compile, compile_, inspect, reset
    from structc.recognition import Recognition, recognize
    from structc.records import Refusal
    from structc.reload import load
    from structc.report import Report

__version__ = "0.1.0"

_LAZY = {
    "Budget": "structc.budget",
    "CompiledModel": "structc.compiled",
    "Refusal": "structc.records",
    "Report": "structc.report",
    "build": "structc.built",
    "compile": "structc.pipeline",
    "compile_": "structc.pipeline",
    "Recognition": "structc.recognition",
    "inspect": "structc.pipeline",
    "load": "structc.reload",
    "recognize": "structc.recognition",
    "reset": "structc.pipeline",
    "use_bundle": "structc.bundle",
}
_MODULES = ("attention", "families", "metrics")

__all__ = [
    "ArtifactCorrupt",
    "ArtifactMismatch",
    "ArtifactVersion",
    "ArtifactWrite",
    "Budget",
    "BudgetNotMet",
    "CacheError",
    "CalibrationError",
    "CaptureError",
    "CompiledModel",
    "ConfigError",
    "InternalError",
    "Interrupted",
    "Recognition",
    "Refusal",
    "Report",
    "ResumeMismatch",
    "StructcError",
    "UnsupportedModel",
    "VerificationFailed",
    "attention",
    "build",
    "compile",
    "compile_",
    "families",
    "inspect",
    "load",
    "metrics",
    "recognize",
    "reset",
    "use_bundle",
]

logging.getLogger("structc").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"structc.{name}")
    else:
        raise AttributeError(f"module 'structc' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
