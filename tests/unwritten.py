"""New tensors are NaN: what a kernel does not write shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def nothing_written(patch: pytest.MonkeyPatch) -> None:
    """Fill whatever numbers are made empty with NaN."""

    def filled(made: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*given: Any, **more: Any) -> Tensor:
            found = made(*given, **more)
            return found.fill_(torch.nan) if found.is_floating_point() else found

        return make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        patch.setattr(owner, name, filled(getattr(owner, name)))
