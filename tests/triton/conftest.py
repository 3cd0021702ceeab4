"""Triton's kernels run here under its interpreter; they are compiled in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's methods look for Triton's kernels."""
    from structc.attention import kernels as lookup
    from structc.codegen.triton import (
        attempt,
        conv_basis,
        methods,
        monarch,
        polynomial,
        sparse_polynomial,
    )

    monkeypatch.setitem(lookup.BACKENDS, "cpu", methods.__name__)
    monkeypatch.setattr(attempt, "_failures", [])
    for module in (conv_basis, monarch, polynomial, sparse_polynomial):
        monkeypatch.setattr(module, "_tried", {})
    lookup._found.cache_clear()
    yield
    lookup._found.cache_clear()
