"""The emitted source is readable and changes only on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from structc.codegen.cpu.emit import Spec, emit, outline

F32, BF16 = torch.float32, torch.bfloat16
SPECS = [
    Spec(F32, ("panel+bias+gelu",)),
    Spec(F32, ("panel", "panel")),
    Spec(F32, ("panel+silu", "strided", "panel+bias+silu")),
    Spec(F32, ("panel", "woven+relu")),
    Spec(BF16, ("panel", "shuffle", "panel+bias")),
    Spec(F32, ("panel+bias+gelu", "panel+bias"), ("", "add+layer")),
    Spec(F32, ("move", "panel+silu", "panel", "panel"), ("rms", "", "mul", "add")),
    Spec(BF16, ("listed", "sparse+bias+gelu_tanh")),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_source(spec: Spec, golden: Callable[[str, str], None]) -> None:
    golden(f"codegen/{spec.name}.cpp", outline(spec))
    source = emit(spec)
    own = outline(spec).partition("\n\n")[2]
    assert source.endswith(own) and own.count("\n") < source.count("\n") / 5


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_source_is_plain(spec: Spec) -> None:
    source = emit(spec)
    assert "@" not in source
    assert max(map(len, source.splitlines())) <= 110
