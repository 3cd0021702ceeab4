"""Triton's kernels run here under its interpreter; they are compiled in processes of their own."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")
