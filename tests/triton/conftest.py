"""Triton's kernels run here under its interpreter; they are compiled in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's methods look for Triton's kernels."""
    from structc.attention import kernels as lookup
    from structc.codegen.triton import attempt, method_kernel, methods

    monkeypatch.setitem(lookup.BACKENDS, "cpu", methods.__name__)
    monkeypatch.setattr(attempt, "_failures", [])
    monkeypatch.setattr(method_kernel, "_tried", {})
    lookup._found.cache_clear()
    yield
    lookup._found.cache_clear()


@pytest.fixture
def ran() -> Callable[[str], bool]:
    """Whether a kernel whose name begins so was launched."""
    from structc.codegen.triton import method_kernel

    return lambda name: any(key[1].startswith(name) for key in method_kernel._tried)
