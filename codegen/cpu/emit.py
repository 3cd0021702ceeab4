"""The emitter: from a program's stages to readable C++.

A library is generic in all sizes; what it is specialised to is a :class:`Spec`. Rows of x are the A
operand as they lie in memory; each factor is packed once, transposed and cut into panels of columns
that stay in L1 or L2 while a tile of tokens passes. A shuffle is a stride of A.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

import torch

from structc.codegen.cpu.served import DTYPES
from structc.codegen.program import Program
from structc.steps import ACTIVATIONS, NORMS


@dataclass(frozen=True)
class Spec:
    """What one library is specialised to; sizes are run-time arguments.

    Attributes:
        dtype: of inputs, weights and outputs.
        stages: for each factor its kind and tail: ``"panel"``, ``"strided+bias+gelu"``.
        wholes: for each factor what is done to whole rows: ``""``, ``"mul+add+layer"``.
    """

    dtype: torch.dtype
    stages: tuple[str, ...]
    wholes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """File name of the emitted source: ``f32_panel_panel-bias-gelu``."""
        both = itertools.zip_longest(self.stages, self.wholes, fillvalue="")
        words = ("+".join(filter(None, pair)).replace("+", "-") for pair in both)
        return "_".join([DTYPES[self.dtype], *words])


def spec_of(program: Program, dtype: torch.dtype) -> Spec:
    """The library that runs a program."""
    words = tuple("+".join(filter(None, [s.kind, s.tail])) for s in program.stages)
    wholes = tuple(s.whole for s in program.stages)
    return Spec(dtype, words, wholes if any(wholes) else ())


def emit(spec: Spec) -> str:
    """The C++ source of one library, self-contained but for the C++ and POSIX libraries."""
    included = "".join(f"#include <{name}>\n" for name in _INCLUDED)
    parts = [f"// structc tile kernel {spec.name}", included, *map(_piece, pieces(spec))]
    return "\n".join(part.rstrip("\n") + "\n" for part in [*parts, *_own(spec)])


_INCLUDED = ("cmath", "cstdint", "cstdlib", "cstring", "new", "pthread.h")


_COARSE = {(act, torch.bfloat16): f"{act}_bf16" for act in ("gelu", "gelu_tanh")}
"""Activations that have a shorter polynomial where results are rounded to fewer bits."""


def pieces(spec: Spec) -> list[str]:
    """The headers that a source is put together from, in their order."""
    words = {part for word in spec.stages for part in word.split("+")[1:]}
    acts = [_COARSE.get((act, spec.dtype), act) for act in ACTIVATIONS if act in words]
    return [*product_pieces(spec.dtype), "tile", *acts]


def product_pieces(dtype: torch.dtype) -> list[str]:
    """The headers that every source in a dtype begins with."""
    return ["base", *(["words"] if dtype == torch.bfloat16 else []), DTYPES[dtype]]


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


KINDS = {
    "panel": ("panel<{}>", "panels"),
    "sparse": ("sparse<{}>", "rows_of_blocks"),
    "strided": ("strided<{}, false>", "strips"),
    "woven": ("strided<{}, true>", "strips"),
    "move": ("move<{}, false>", "eighths"),
    "listed": ("move<{}, true>", "eighths"),
    "shuffle": ("shuffle<{}>", "eighths"),
}
"""For each kind of stage the function that serves a unit of it, and the one that counts units."""


def _entry(spec: Spec, tails: list[str]) -> str:
    count = len(tails)
    functions = (KINDS[word.split("+")[0]] for word in spec.stages)
    steps = (f"{{{u.format(t)}, {n}}}" for (u, n), t in zip(functions, tails, strict=True))
    wholes = map(_whole, spec.wholes or [""] * count)
    return f"""\
extern "C" int32_t structc_run(const void* const* inputs, const void* const* weights, void* y,
                               int64_t rows, const int64_t* sizes) {{
  try {{
    static constexpr Step steps[] = {{
{_lines(steps)}    }};
    static constexpr Whole wholes[] = {{
{_lines(wholes)}    }};
    return run(steps, wholes, Chain<{count}>(sizes, weights), inputs, static_cast<T*>(y), rows);
  }} catch (...) {{
    return 2;  // out of memory; an exception may not cross into C
  }}
}}
"""


def _lines(values: Iterable[str]) -> str:
    return "".join(f"        {value},\n" for value in values)


def _whole(word: str) -> str:
    if not word:
        return "nullptr"
    parts = word.split("+")
    flags = [str(flag in parts).lower() for flag in ("mul", "add")]
    kind = parts[-1].title() if parts[-1] in NORMS else "None"
    return f"whole<{', '.join(flags)}, {kind}>"
