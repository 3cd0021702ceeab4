"""The emitter: from a program's stages to readable C++.

A library is generic in all sizes; what it is specialised to is a :class:`Spec`. Two layouts:

``token``    rows of x are the A operand as they lie in memory; each factor is packed once,
             transposed and cut into panels of columns that stay in L1 or L2 while a tile passes.
``feature``  a tile of tokens is transposed in registers, features become rows, and the factors are
             the A operand as stored. A permutation is then a stride (``ldc``) and narrow blocks
             still fill vectors, which run along tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from importlib import resources

import torch

from structc.codegen.cpu.program import DTYPES, Program
from structc.forms import ACTIVATIONS


@dataclass(frozen=True)
class Spec:
    """What one library is specialised to; sizes are run-time arguments.

    Attributes:
        layout: ``"token"`` or ``"feature"``.
        dtype: of inputs, weights and outputs.
        stages: for each factor its kind and tail: ``"panel"``, ``"strided+bias+gelu"``.
        rows: for each factor what is done to whole rows: ``""``, ``"add+layer"``.
    """

    layout: str
    dtype: torch.dtype
    stages: tuple[str, ...]
    rows: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """File name of the emitted source: ``token_f32_panel_panel-bias-gelu``."""
        both = itertools.zip_longest(self.stages, self.rows, fillvalue="")
        words = ("+".join(filter(None, pair)).replace("+", "-") for pair in both)
        return "_".join([self.layout, DTYPES[self.dtype], *words])


def spec_of(program: Program, layout: str, dtype: torch.dtype) -> Spec:
    """The library that runs a program."""
    words = tuple(_word(layout, s.block.d, s.tail) for s in program.stages)
    rows = tuple(s.rows_tail for s in program.stages)
    return Spec(layout, dtype, words, rows if any(rows) else ())


def _word(layout: str, d: int, tail: str) -> str:
    kind = "rows" if layout == "feature" else "strided" if d > 1 else "panel"
    return f"{kind}+{tail}" if tail else kind


def emit(spec: Spec) -> str:
    """The C++ source of one library, self-contained but for the C++ standard library."""
    included = "".join(f"#include <{name}>\n" for name in _STANDARD)
    parts = [f"// structc tile kernel {spec.name}", included, *map(_piece, pieces(spec))]
    return "\n".join(part.rstrip("\n") + "\n" for part in [*parts, *_own(spec)])


_STANDARD = ("cmath", "cstdint", "cstdlib", "cstring", "new")


def pieces(spec: Spec) -> list[str]:
    """The headers that a source is put together from, in their order."""
    layout = ("token",) if spec.layout == "token" else ("transpose", "feature")
    words = {part for word in spec.stages for part in word.split("+")[1:]}
    return ["base", DTYPES[spec.dtype], *layout, *(act for act in ACTIVATIONS if act in words)]


def _own(spec: Spec) -> list[str]:
    """What is written for this library alone: its epilogues and its entry."""
    tails = [tuple(word.split("+")[1:]) for word in spec.stages]
    return [*map(_tail, dict.fromkeys(tails)), _entry(spec, [_name(tail) for tail in tails])]


def outline(spec: Spec) -> str:
    """The source with the name of each header in place of its text, for people and golden files."""
    named = [f"// {name}.h" for name in pieces(spec)]
    return "\n".join(part.rstrip("\n") + "\n" for part in ["\n".join(named), *_own(spec)])


def _piece(name: str) -> str:
    return resources.files("structc.codegen.cpu").joinpath(f"{name}.h").read_text()


def _name(tail: tuple[str, ...]) -> str:
    words = "".join(word.title() for part in tail for word in part.split("_"))
    return words or "Plain"


def _tail(parts: tuple[str, ...]) -> str:
    act = next((part for part in parts if part != "bias"), "")
    flags = f"any = {str(bool(parts)).lower()}, bias = {str('bias' in parts).lower()}"
    return f"""\
struct {_name(parts)} {{
  static constexpr bool {flags};
  static inline float apply(float v) {{ return {f"{act}(v)" if act else "v"}; }}
}};
"""


def _entry(spec: Spec, tails: list[str]) -> str:
    count = len(tails)
    if spec.layout == "token":
        kinds = (word.split("+")[0] for word in spec.stages)
        steps = ", ".join(f"{k}<{t}>" for k, t in zip(kinds, tails, strict=True))
        rows = ", ".join(map(_rows, spec.rows or [""] * count))
        tables = (
            f"    static constexpr Step steps[] = {{{steps}}};\n"
            f"    static constexpr Rows tails[] = {{{rows}}};\n"
        )
        call = f"run(steps, tails, Chain<{count}>(sizes, weights), inputs"
    else:
        tables = ""
        call = f"run<{tails[-1]}>(Chain<{count}>(sizes, weights), static_cast<const T*>(*inputs)"
    return f"""\
extern "C" int32_t structc_run(const void* const* inputs, const void* const* weights, void* y,
                               int64_t rows, const int64_t* sizes) {{
  try {{
{tables}    return {call},
               static_cast<T*>(y), rows);
  }} catch (...) {{
    return 2;  // out of memory; an exception may not cross into C
  }}
}}
"""


def _rows(word: str) -> str:
    if not word:
        return "nullptr"
    added, kind = "add" in word.split("+"), word.removeprefix("add").lstrip("+")
    return f"whole_rows<{str(added).lower()}, {kind.title() or 'None'}>"
