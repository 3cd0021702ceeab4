"""Softmax attention as Triton sources: forward, and the two kernels of its gradient.

One program takes a tile of queries of one head and goes over tiles of keys: those alone that the
rule lets one of its queries see (causal, window, sinks), and of them none that ``blocks`` hides
whole. Row sums are kept in float32 relative to the largest score so far (online softmax, Milakov
and Gimelshein 2018); the gradient computes scores again from the row sums (FlashAttention-2, Dao
2023, algorithm 2), keys and values of a group of heads added up in one program, in order.

Numbers of the form stand in the source; lengths, the offset of the diagonal and strides are
arguments, so that a growing cache of keys needs no new kernel. What the form does not have is not
in the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from structc.codegen.triton.config import DOT, power_above
from structc.codegen.triton.pieces import HEAD, product
from structc.codegen.triton.tile import rounds
from structc.softmax import Extras, Softmax

GONE = 'float("-inf")'
SLAB = 32
"""Numbers of a head that a product takes at a time where float32 rows are longer than twice that: a
factor is three bfloat16 ones in registers. What stays the same over a loop is read again in each
turn then, or the compiler would keep it in three as well."""
LENGTHS = ("heads", "share", "queries", "keys", "offset")
_STRIDES = ("b", "h", "n")


@dataclass(frozen=True)
class Shape:
    """What one source is for.

    Attributes:
        form: with offset 0.
        d, dv: sizes of a head of keys and of values.
        bias: ``"float"``, ``"bool"`` or ``""``.
        lags, shown, blocks, sink: which other extras there are.
        tf32: whether float32 products may round their factors to 10 bits.
        slab: numbers of a head that a product of the gradient takes at a time; 0 for all.
    """

    form: Softmax
    d: int
    dv: int
    bias: str = ""
    lags: bool = False
    shown: bool = False
    blocks: bool = False
    sink: bool = False
    tf32: bool = False
    slab: int = 0

    @staticmethod
    def of(form: Softmax, d: int, dv: int, extras: Extras, dtype: torch.dtype) -> Shape:
        """That of a call on q, k and v of a dtype."""
        bias = ""
        if extras.bias is not None:
            bias = "float" if extras.bias.is_floating_point() else "bool"
        lags, shown, blocks, sink = (
            t is not None for t in (extras.lags, extras.keys, extras.blocks, extras.sink)
        )
        same = replace(form, offset=0, fill=0.0)
        slab = slab_of(dtype, max(d, dv))
        return Shape(same, d, dv, bias, lags, shown, blocks, sink, rounds(dtype), slab)

    @property
    def wide(self) -> tuple[int, int]:
        """The sizes of heads as powers of two, for products."""
        return max(DOT, power_above(self.d)), max(DOT, power_above(self.dv))

    @property
    def cuts(self) -> tuple[tuple[Cut, ...], tuple[Cut, ...]]:
        """What products take of a head of keys and of one of values at a time."""
        d, e = self.wide
        return _cuts("c", d, self.slab or d), _cuts("e", e, self.slab or e)

    def tensors(self, kernel: str) -> tuple[str, ...]:
        """Pointers of a kernel, in order."""
        some = (("bias", self.bias), ("lags", self.lags), ("shown", self.shown),
                ("blocks", self.blocks))  # fmt: skip
        more = tuple(name for name, there in some if there)
        own = {
            "forward": (*(("sink",) if self.sink else ()), "o", "lse"),
            "queries": ("grad", "lse", "dots", "dq"),
            "keys": ("grad", "lse", "dots", "dk", "dv"),
        }[kernel]
        return ("q", "k", "v", *more, *own)

    def strides(self, kernel: str) -> tuple[str, ...]:
        """Strides of those tensors, in order."""
        out = {"forward": "o", "queries": "g", "keys": "g"}[kernel]
        found = [f"{t}{s}" for t in ("q", "k", "v", out) for s in _STRIDES]
        if self.bias:
            found += ["bias_b", "bias_h", "bias_m", "bias_n"]
        found += ["lags_h"] if self.lags else []
        found += ["shown_b"] if self.shown else []
        found += ["blocks_b", "blocks_h", "blocks_m", "blocks_n"] if self.blocks else []
        return tuple(found)


class Cut(NamedTuple):
    """Neighbouring numbers of a head.

    Attributes:
        end: what names of its tensors end in.
        at: which numbers, in the source.
        wide: how many.
    """

    end: str
    at: str
    wide: int


def _cuts(name: str, wide: int, slab: int) -> tuple[Cut, ...]:
    """A head of ``wide`` numbers in slabs, the first of which is ``name``."""
    if wide <= slab:
        return (Cut("", name, wide),)
    return tuple(
        Cut(str(at), f"({name} + {at * slab})" if at else name, slab) for at in range(wide // slab)
    )


def slab_of(dtype: torch.dtype, wide: int) -> int:
    """How many numbers of a head products of the gradient take at a time; 0 for all.

    >>> slab_of(torch.float32, 128), slab_of(torch.float32, 64), slab_of(torch.bfloat16, 128)
    (32, 0, 0)
    """
    return SLAB if dtype == torch.float32 and wide > 2 * SLAB else 0


def emit(shape: Shape) -> str:
    """The source of forward and backward.

    >>> print(emit(Shape(Softmax(0.5), 16, 16)).splitlines()[6])
    @triton.jit(do_not_specialize=["heads", "share", "queries", "keys", "offset"])
    """
    parts = [_forward(replace(shape, slab=0)), _for_queries(shape), _for_keys(shape)]
    return "\n\n".join([HEAD, *("\n".join(lines) + "\n" for lines in parts)])


def _head(shape: Shape, kernel: str, text: str) -> Iterator[str]:
    told = ", ".join(f'"{n}"' for n in LENGTHS)
    yield f"@triton.jit(do_not_specialize=[{told}])"
    yield f"def attention_{kernel}({', '.join(shape.tensors(kernel))},"
    indent = " " * len(f"def attention_{kernel}(")
    names = shape.strides(kernel)
    for at in range(0, len(names), 12):
        yield f"{indent}{', '.join(names[at : at + 12])},"
    yield f"{indent}{', '.join(LENGTHS)},"
    yield f"{indent}BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr):"
    yield f'    """{text}: heads of {shape.d} and {shape.dv}, {shape.form}"""'


def _product(shape: Shape, left: str, right: str) -> str:
    return product(left, right, "", shape.tf32)


def _inner(shape: Shape, cuts: Sequence[Cut], left: str, right: str) -> Iterator[str]:
    """``s`` or ``dp``: the product over all numbers of a head, slab after slab."""
    name = {"left": "s", "slope": "dp"}[left]
    for cut in cuts:
        found = _product(shape, left + cut.end, right + cut.end)
        yield f"{name} {'=' if cut is cuts[0] else '+='} {found}"


# ---------------------------------------------------------------------------- what all share


def _places(shape: Shape) -> Iterator[str]:
    """Where this program's head lies."""
    yield "    other = head // share"
    yield "    q += batch.to(tl.int64) * qb + head.to(tl.int64) * qh"
    yield "    k += batch.to(tl.int64) * kb + other.to(tl.int64) * kh"
    yield "    v += batch.to(tl.int64) * vb + other.to(tl.int64) * vh"
    yield from _numbers(shape)
    yield from _extra_places(shape, "    ")


def _numbers(shape: Shape) -> Iterator[str]:
    for cut, *_ in shape.cuts:
        yield f"    {cut.at} = tl.arange(0, {cut.wide})"


def _extra_places(shape: Shape, indent: str, head: str = "head") -> Iterator[str]:
    where = {
        "bias": f"batch.to(tl.int64) * bias_b + {head}.to(tl.int64) * bias_h",
        "lags": f"{head}.to(tl.int64) * lags_h",
        "blocks": f"batch.to(tl.int64) * blocks_b + {head}.to(tl.int64) * blocks_h",
    }
    for name, there in (("bias", shape.bias), ("lags", shape.lags), ("blocks", shape.blocks)):
        if there:
            yield f"{indent}{name}_at = {name} + {where[name]}"


def _key_span(shape: Shape) -> Iterator[str]:
    """Which keys the rule lets this tile of queries see: ``[low, high)``, and sinks below ``edge``.

    ``low`` is a multiple of BN; sinks from there on are met on the way.
    """
    form = shape.form
    yield "    last = tl.minimum(first + BM, queries)"
    yield "    low = 0"
    yield "    high = keys"
    if form.causal:
        yield "    high = tl.minimum(keys, tl.maximum(0, last + offset))"
    elif form.window:
        yield f"    high = tl.minimum(keys, tl.maximum(0, last - 1 + offset + {form.window}))"
    if form.window:
        least = f"tl.maximum(0, first + offset - {form.window - 1})"
        yield f"    low = tl.minimum(keys, {least}) // BN * BN"
        if form.sinks:
            most = "high" if form.causal else "keys"
            yield f"    sunk = tl.minimum({form.sinks}, {most})"
            yield "    high = tl.maximum(high, sunk)"
            yield "    edge = tl.minimum(sunk, low)"


def _query_span(shape: Shape) -> Iterator[str]:
    """Which queries may see this tile of keys by rule: ``[low, high)``, ``low`` in tiles."""
    form = shape.form
    yield "    low = 0"
    yield "    high = queries"
    if form.causal:
        yield "    low = tl.maximum(0, first - offset)"
    elif form.window:
        yield f"    low = tl.maximum(0, first - offset - {form.window - 1})"
    if form.window:
        yield f"    high = tl.minimum(queries, first + BN - 1 - offset + {form.window})"
        if form.sinks:
            yield f"    if first < {form.sinks}:"
            yield "        high = queries"
            if not form.causal:
                yield "        low = 0"
    yield "    low = low // BM * BM"


def _scores(shape: Shape, until: str = "keys") -> Iterator[str]:
    """Scores of queries ``m`` and keys ``j`` from ``left`` and ``right``; hidden ones are -inf."""
    form = shape.form
    yield from _inner(shape, shape.cuts[0], "left", "right")
    yield f"s *= {form.scale!r}"
    if form.softcap:
        yield f"bent = 2.0 * tl.sigmoid(s * {2.0 / form.softcap!r}) - 1.0"
        yield f"s = bent * {form.softcap!r}"
    # rows past the last query are left as they come: they meet zeros, and are not stored
    if shape.shown:
        yield _shown()
        yield f"seen = ((j < {until}) & (there != 0))[None, :]"
    else:
        yield f"seen = (j < {until})[None, :]"
    if form.causal or form.window:
        yield "t = m[:, None] + offset"
    if form.window:
        near = f"(j[None, :] > t - {form.window})"
        if not form.causal:
            near = f"({near} & (j[None, :] < t + {form.window}))"
        if form.sinks:
            near = f"({near} | (j < {form.sinks})[None, :])"
        yield f"seen = seen & {near}"
    if form.causal:
        yield "seen = seen & (j[None, :] <= t)"
    inside = "(m < queries)[:, None] & (j < keys)[None, :]"
    if shape.bias:
        yield "place = m.to(tl.int64)[:, None] * bias_m + j.to(tl.int64)[None, :] * bias_n"
        yield f"more = tl.load(bias_at + place, mask={inside}, other=0)"
        yield "s += more.to(tl.float32)" if shape.bias == "float" else "seen = seen & (more != 0)"
    if shape.lags:
        yield "lag = m[:, None] - j[None, :] + keys - 1"
        yield f"s += tl.load(lags_at + lag, mask={inside}, other=0.0).to(tl.float32)"
    if shape.blocks:
        yield "seen = seen & (allowed != 0)"
    yield f"s = tl.where(seen, s, {GONE})"


def _shown() -> str:
    return "there = tl.load(shown + batch.to(tl.int64) * shown_b + j, mask=j < keys, other=0)"


def _allowed(shape: Shape) -> Iterator[str]:
    """Which blocks hold the pairs of this tile; the tile is left out where none does."""
    form = shape.form
    yield f"rows = (m // {form.block_q}).to(tl.int64)[:, None] * blocks_m"
    yield f"place = rows + (j // {form.block_k}).to(tl.int64)[None, :] * blocks_n"
    inside = "(m < queries)[:, None] & (j < keys)[None, :]"
    yield f"allowed = tl.load(blocks_at + place, mask={inside}, other=0)"
    yield "if tl.max(allowed.to(tl.int32)) > 0:"


def _load(name: str, rows: str, columns: str, size: int, length: str, step: str) -> str:
    """A tile of a tensor, rows of it down or across as their index is shaped."""
    at = f"{rows}.to(tl.int64) * {step} + {columns}"
    return f"tl.load({name} + {at}, mask=({rows} < {length}) & ({columns} < {size}), other=0.0)"


def _rows(shape: Shape, name: str, of: str, m: str = "m") -> Iterator[str]:
    """Tiles of a tensor of queries, slab after slab."""
    cuts, size = (shape.cuts[0], shape.d) if name == "left" else (shape.cuts[1], shape.dv)
    step = {"left": "qn", "slope": "gn"}[name]
    for cut in cuts:
        tile = _load(of, f"{m}[:, None]", f"{cut.at}[None, :]", size, "queries", step)
        yield f"{name}{cut.end} = {tile}"


def _keys(shape: Shape, j: str = "j") -> Iterator[str]:
    """Tiles of keys across."""
    for cut in shape.cuts[0]:
        tile = _load("k", f"{j}[None, :]", f"{cut.at}[:, None]", shape.d, "keys", "kn")
        yield f"right{cut.end} = {tile}"


def _values(shape: Shape, down: bool, j: str = "j") -> Iterator[str]:
    """Tiles of values, (keys, dv) or across; those of hidden keys are 0: they may be NaN."""
    name, row, column = (
        ("value", ":, None", "None, :") if down else ("across", "None, :", ":, None")
    )
    for cut in shape.cuts[1]:
        tile = _load("v", f"{j}[{row}]", f"{cut.at}[{column}]", shape.dv, "keys", "vn")
        if shape.shown:
            tile = tile.replace("mask=", f"mask=(there != 0)[{row}] & ")
        yield f"{name}{cut.end} = {tile}"


def _loop(shape: Shape, body: list[str], spans: list[tuple[str, str, str]]) -> Iterator[str]:
    """``body`` over tiles of keys; each span is its start, its end and what bounds its keys."""
    for low, high, until in spans:
        yield f"    for start in range({low}, {high}, BN):"
        yield "        j = start + tl.arange(0, BN)"
        indent = "        "
        if shape.blocks:
            yield from (indent + line for line in _allowed(shape))
            indent += "    "
        again = [_again("m"), *_rows(shape, "left", "q", "again")] if shape.slab else []
        lines = [*_keys(shape), *again, *_scores(shape, until), *body]
        yield from (indent + line for line in lines)


def _spans(shape: Shape) -> list[tuple[str, str, str]]:
    sunk = [("0", "edge", "edge")] if shape.form.window and shape.form.sinks else []
    return [*sunk, ("low", "high", "keys")]


# ---------------------------------------------------------------------------- forward


def _forward(shape: Shape) -> Iterator[str]:
    cuts = shape.cuts[1]
    yield from _head(shape, "forward", "softmax attention and its row sums")
    yield from _query_program(shape)
    yield f"    top = tl.full((BM,), {GONE}, tl.float32)"
    yield "    total = tl.zeros((BM,), tl.float32)"
    yield from _zeros("sums", "BM", cuts)
    body = [
        "above = tl.maximum(top, tl.max(s, 1))",
        f"safe = tl.where(above == {GONE}, 0.0, above)",
        "p = tl.exp(s - safe[:, None])",
        "less = tl.exp(top - safe)",
        "total = total * less + tl.sum(p, 1)",
        *_values(shape, down=True),
        *(
            f"sums{c.end} = sums{c.end} * less[:, None] + {_product(shape, 'p', f'value{c.end}')}"
            for c in cuts
        ),
        "top = above",
    ]
    yield from _loop(shape, body, _spans(shape))
    if shape.sink:
        yield "    one = tl.load(sink + head).to(tl.float32)"
        yield "    above = tl.maximum(top, one)"
        yield f"    safe = tl.where(above == {GONE}, 0.0, above)"
        yield "    less = tl.exp(top - safe)"
        yield "    total = total * less + tl.exp(one - safe)"
        yield from (f"    sums{c.end} = sums{c.end} * less[:, None]" for c in cuts)
        yield "    top = above"
    yield "    none = total == 0.0"
    yield f"    found = tl.where(none, {GONE}, top + tl.log(tl.where(none, 1.0, total)))"
    yield "    row = (batch * heads + head).to(tl.int64) * queries + m"
    yield "    tl.store(lse + row, found, mask=m < queries)"
    yield "    o += batch.to(tl.int64) * ob + head.to(tl.int64) * oh"
    found = "({} / tl.where(none, 1.0, total)[:, None])"
    row = "m.to(tl.int64)[:, None] * on"
    yield from _stored("o", found, "sums", cuts, row, "m < queries", shape.dv)


def _zeros(name: str, rows: str, cuts: Sequence[Cut]) -> Iterator[str]:
    for cut in cuts:
        yield f"    {name}{cut.end} = tl.zeros(({rows}, {cut.wide}), tl.float32)"


def _stored(
    out: str, found: str, name: str, cuts: Sequence[Cut], row: str, inside: str, size: int
) -> Iterator[str]:
    """Sums go where they belong; ``found`` says what of them."""
    for cut in cuts:
        place = f"{cut.at}[None, :]"
        yield f"    inside = ({inside})[:, None] & ({place} < {size})"
        made = f"{found.format(name + cut.end)}.to({out}.dtype.element_ty)"
        yield f"    tl.store({out} + {row} + {place}, {made}, mask=inside)"


def _query_program(shape: Shape) -> Iterator[str]:
    """Which queries are this program's, the last ones first: causal, they take longest."""
    yield "    tiles = tl.cdiv(queries, BM)"
    yield "    pid = tl.program_id(0)"
    yield "    head = pid // tiles % heads"
    yield "    batch = pid // tiles // heads"
    yield "    first = (tiles - 1 - pid % tiles) * BM"
    yield "    m = first + tl.arange(0, BM)"
    yield from _places(shape)
    if not shape.slab:
        yield from ("    " + line for line in _rows(shape, "left", "q"))
    yield from _key_span(shape)


# ---------------------------------------------------------------------------- backward


def _slopes(shape: Shape) -> list[str]:
    """From scores to weights ``p`` and the gradient of scores ``ds``, scale left out."""
    lines = [
        "p = tl.exp(s - sums[:, None])",
        *_inner(shape, shape.cuts[1], "slope", "across"),
        "ds = p * (dp - dot[:, None])",
    ]
    return lines + (["ds = ds * (1.0 - bent * bent)"] if shape.form.softcap else [])


def _again(rows: str) -> str:
    """The same places, which a compiler takes for others in each turn: no start is below 0."""
    return f"again = {rows} + tl.minimum(start, 0)"


def _row_facts(indent: str) -> Iterator[str]:
    yield f"{indent}row = (batch * heads + head).to(tl.int64) * queries + m"
    yield f"{indent}sums = tl.load(lse + row, mask=m < queries, other=0.0)"
    yield f"{indent}sums = tl.where(sums == {GONE}, 0.0, sums)"
    yield f"{indent}dot = tl.load(dots + row, mask=m < queries, other=0.0)"


def _for_queries(shape: Shape) -> Iterator[str]:
    cuts = shape.cuts[0]
    yield from _head(shape, "queries", "the gradient of q")
    yield from _query_program(shape)
    yield "    grad += batch.to(tl.int64) * gb + head.to(tl.int64) * gh"
    if not shape.slab:
        yield from ("    " + line for line in _rows(shape, "slope", "grad"))
    yield from _row_facts("    ")
    yield from _zeros("made", "BM", cuts)
    body = [*_values(shape, down=False), *_slopes(shape)]
    if shape.slab:
        body = [*_rows(shape, "slope", "grad", "again"), *body]
    body += [f"made{c.end} += {_product(shape, 'ds', f'tl.trans(right{c.end})')}" for c in cuts]
    yield from _loop(shape, body, _spans(shape))
    found, row = f"({{}} * {shape.form.scale!r})", f"row[:, None] * {shape.d}"
    yield from _stored("dq", found, "made", cuts, row, "m < queries", shape.d)


def _for_keys(shape: Shape) -> Iterator[str]:
    cuts, cuts_v = shape.cuts
    yield from _head(shape, "keys", "the gradients of k and v, of a group of heads")
    yield "    tiles = tl.cdiv(keys, BN)"
    yield "    pid = tl.program_id(0)"
    yield "    other = pid // tiles % (heads // share)"
    yield "    batch = pid // tiles // (heads // share)"
    yield "    first = pid % tiles * BN"
    yield "    j = first + tl.arange(0, BN)"
    yield "    k += batch.to(tl.int64) * kb + other.to(tl.int64) * kh"
    yield "    v += batch.to(tl.int64) * vb + other.to(tl.int64) * vh"
    yield from _numbers(shape)
    j = "again" if shape.slab else "j"
    kept = [*_keys(shape, j), *_values(shape, False, j)]
    if shape.shown:
        yield f"    {_shown()}"
    if not shape.slab:
        yield from ("    " + line for line in kept)
    yield from _query_span(shape)
    yield from (*_zeros("made", "BN", cuts), *_zeros("value", "BN", cuts_v))
    yield "    for one in range(share):"
    yield "        head = other * share + one"
    yield from _extra_places(shape, "        ")
    yield "        ask = q + batch.to(tl.int64) * qb + head.to(tl.int64) * qh"
    yield "        want = grad + batch.to(tl.int64) * gb + head.to(tl.int64) * gh"
    yield "        for start in range(low, high, BM):"
    yield "            m = start + tl.arange(0, BM)"
    indent = "            "
    if shape.blocks:
        yield from (indent + line for line in _allowed(shape))
        indent += "    "
    body = [_again("j"), *kept] if shape.slab else []
    body += [*_rows(shape, "left", "ask"), *_rows(shape, "slope", "want"), *_row_facts("")]
    body += [*_scores(shape), *_slopes(shape)]
    for name, weight, rows, some in (
        ("value", "p", "slope", cuts_v), ("made", "ds", "left", cuts)
    ):  # fmt: skip
        body += [
            f"{name}{c.end} += {_product(shape, f'tl.trans({weight})', rows + c.end)}" for c in some
        ]
    yield from (indent + line for line in body)
    yield "    row = (batch * (heads // share) + other).to(tl.int64) * keys + j"
    scale = f"({{}} * {shape.form.scale!r})"
    for name, found, sums, some, size in (
        ("dk", scale, "made", cuts, shape.d), ("dv", "{}", "value", cuts_v, shape.dv)
    ):  # fmt: skip
        yield from _stored(name, found, sums, some, f"row[:, None] * {size}", "j < keys", size)
