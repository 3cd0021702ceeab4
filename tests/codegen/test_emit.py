"""The emitted source is readable and changes only on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from structc.codegen.cpu.emit import Spec, emit

SPECS = [
    Spec(1, False, True, "gelu", "token"),
    Spec(2, False, False, "", "token"),
    Spec(2, True, True, "silu", "token"),
    Spec(1, False, False, "relu", "feature"),
    Spec(2, True, True, "gelu_tanh", "feature"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_source(spec: Spec, golden: Callable[[str, str], None]) -> None:
    golden(f"codegen/{spec.name}.cpp", emit(spec))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_source_is_plain(spec: Spec) -> None:
    source = emit(spec)
    assert "@" not in source and "nullptr, nullptr" not in source
    assert max(map(len, source.splitlines())) <= 110
