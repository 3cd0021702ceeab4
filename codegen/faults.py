"""Kernels that misbehave on purpose, so that tests can prove that the tuner survives them.

Reachable through a :class:`structc.codegen.bench.Job` alone: no configuration names one, and
``lower.bind`` knows none.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from structc import reference
from structc.forms import Form

CHECK_CALLS = 2
"""How often a kernel is called before it is timed."""
KINDS = ("hang", "crash", "exit", "wrong", "nan", "overrun", "late_crash", "late_hang")


class FaultyKernel:
    """A kernel of one of the :data:`KINDS`."""

    def __init__(self, kind: str, form: Form) -> None:
        self.kind, self.form, self.text = kind, form, str(form)
        self.calls = 0

    def __call__(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        y = torch.empty(x.shape[0], self.form.out_features, dtype=x.dtype)
        self.into(x, weights, y)
        return y

    def into(self, x: Tensor, weights: Sequence[Tensor], y: Tensor) -> None:
        """Write ``y``, or do what the kind says."""
        self.calls += 1
        kind = self.kind
        if kind.startswith("late_"):  # right when checked, wrong when timed
            late = self.calls > CHECK_CALLS
            kind = kind.removeprefix("late_") if late else ""
            right = reference.tile_reference(x.double(), [w.double() for w in weights], self.text)
            y.copy_(right)
        else:
            y.zero_()
        match kind:
            case "hang":
                time.sleep(3600)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(0)
            case "nan":
                y.fill_(float("nan"))
            case "overrun":
                end = y.data_ptr() + y.numel() * y.element_size()
                ctypes.memset(end, 0, y.element_size())


def make(kind: str, form: Form) -> FaultyKernel:
    """A kernel that misbehaves in this way."""
    return FaultyKernel(kind, form)
