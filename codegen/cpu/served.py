"""Which tile programs this processor has emitted kernels for."""

from __future__ import annotations

import torch

from structc import hardware
from structc.codegen.program import Program, stages_of
from structc.forms import Tile
from structc.records import Refusal

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
NEEDS = {torch.float32: "avx2", torch.bfloat16: "avx512_bf16"}
"""The instruction set without which a dtype has no emitted kernel."""


def analyse(form: Tile, dtype: torch.dtype = torch.float32) -> Program | Refusal:
    """The program's stages, or why no kernel is emitted for it here.

    >>> analyse(Tile.parse("block(1,8,32,1) block(1,32,8,1) act(relu,32)")).stages[-1].act
    'relu'
    """
    if dtype not in DTYPES:
        return _refuse("DTYPE", f"emitted kernels are float32 or bfloat16, not {dtype}")
    isa = hardware.target().isa
    if NEEDS[dtype] not in isa:
        return _refuse("ISA", f"{dtype} needs {NEEDS[dtype]}; this processor has {', '.join(isa)}")
    return stages_of(form, dtype)


def _refuse(code: str, reason: str) -> Refusal:
    return Refusal("", "tile", code, reason)
