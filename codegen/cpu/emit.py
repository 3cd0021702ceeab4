"""The emitter: from a tile program to readable C++.

A library is generic in all sizes; what it is specialised to is a :class:`Spec`. Two layouts:

``token``    rows of x are the A operand as they lie in memory; each factor is packed once,
             transposed and cut into panels of columns that stay in L1 or L2 while a tile passes.
``feature``  a tile of tokens is transposed in registers, features become rows, and the factors are
             the A operand as stored. A permutation is then a stride (``ldc``) and narrow blocks
             still fill vectors, which run along tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from structc.forms import Act, Bias, Block, Permute, Tile
from structc.records import Refusal

LAYOUTS = ("token", "feature")


@dataclass(frozen=True)
class Spec:
    """What one library is specialised to; sizes are run-time arguments.

    Attributes:
        factors: block factors, 1 or 2.
        permuted: whether a perfect shuffle (a1, b1) stands between two factors.
        bias: whether a bias is added.
        act: the activation at the end, or ``""``.
        layout: ``"token"`` or ``"feature"``.
    """

    factors: int
    permuted: bool
    bias: bool
    act: str
    layout: str

    @property
    def name(self) -> str:
        """File name of the emitted source: ``token_2p_bias_gelu``."""
        shape = f"{self.factors}{'p' if self.permuted else ''}"
        return "_".join(
            [
                self.layout,
                shape,
                *(["bias"] if self.bias else []),
                *([self.act] if self.act else []),
            ]
        )


@dataclass(frozen=True)
class Program:
    """A tile program in the shape that the emitter serves."""

    first: Block
    second: Block | None
    permuted: bool
    bias: bool
    act: str

    @property
    def in_features(self) -> int:
        return self.first.in_features

    @property
    def out_features(self) -> int:
        return (self.second or self.first).out_features

    @property
    def middle(self) -> int:
        """Features between the factors."""
        return self.first.out_features if self.second else 0

    def spec(self, layout: str) -> Spec:
        return Spec(2 if self.second else 1, self.permuted, self.bias, self.act, layout)


def analyse(form: Tile, layout: str) -> Program | Refusal:
    """The program's parts, or why no kernel of this layout is emitted for it.

    >>> analyse(Tile.parse("block(1,8,32,1) block(1,32,8,1) act(relu,32)"), "token").act
    'relu'
    """
    steps = list(form.steps)
    act = steps.pop().fn if isinstance(steps[-1], Act) else ""  # type: ignore[union-attr]
    bias = bool(steps) and isinstance(steps[-1], Bias)
    if bias:
        steps.pop()
    match steps:
        case [Block() as first]:
            program = Program(first, None, False, bias, act)
        case [Block() as first, Block() as second]:
            program = Program(first, second, False, bias, act)
        case [Block() as first, Permute(p, q), Block() as second] if (p, q) == (first.a, first.b):
            shuffles = first.a > 1 and first.b > 1
            program = Program(first, second, shuffles, bias, act)
        case _:
            return _refuse("STEPS", f"{form}: not one or two block factors with an epilogue")
    return _unserved(program, layout) or program


def _unserved(program: Program, layout: str) -> Refusal | None:
    first, second = program.first, program.second
    blocks = [b for b in (first, second) if b is not None]
    if min(min(b.a, b.b, b.c) for b in blocks) < 1:
        return _refuse("EMPTY", "a block factor without elements has no emitted kernel")
    if first.d != 1 or (second is not None and second.d != 1):
        return _refuse("STRIDED", "block factors with d > 1 have no emitted kernel")
    if program.permuted and layout == "token":
        assert second is not None
        if second.c % first.a:
            return _refuse(
                "SPLIT", f"groups of {second.c} do not take whole parts of {first.a} blocks"
            )
    return None


def _refuse(code: str, reason: str) -> Refusal:
    return Refusal("", "tile", code, reason)


def emit(spec: Spec) -> str:
    """The C++ source of one library, self-contained but for the C++ standard library."""
    parts = [
        f"// structc tile kernel {spec.name}: {_sentence(spec)}",
        "".join(
            f"#include <{name}>\n" for name in ("cmath", "cstdint", "cstdlib", "cstring", "new")
        ),
        _piece("base"),
        _piece("panels" if spec.layout == "token" else "transpose"),
        *([_piece(spec.act)] if spec.act else []),
        _finish(spec),
        _SIZES,
        _token(spec) if spec.layout == "token" else _feature(spec),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _piece(name: str) -> str:
    return resources.files("structc.codegen.cpu").joinpath(f"{name}.h").read_text()


def _sentence(spec: Spec) -> str:
    product = {
        (1, False): "y = x W1",
        (2, False): "y = (x W1) W2",
        (2, True): "y = shuffle(x W1) W2",
    }[spec.factors, spec.permuted]
    extra = (" + bias" if spec.bias else "") + (f", then {spec.act}" if spec.act else "")
    return f"{product}{extra}; float32."


_SIZES = """\
// Factor f has a_f blocks, each (b_f out, c_f in). Set by the caller, checked there.
struct Sizes {
  int64_t a1, b1, c1, a2, b2, c2, tile, panel1, panel2, split;
};
"""


def _finish(spec: Spec) -> str:
    if not spec.bias and not spec.act:
        return ""
    value = "row[c] + bias[c]" if spec.bias else "row[c]"
    if spec.act:
        value = f"activate({value})"
    return f"""\
// The epilogue, in place, while the block is still in L1.
static inline void finish(float* y, int64_t ldy, int64_t rows, int64_t cols, const float* bias) {{
  for (int64_t t = 0; t < rows; ++t) {{
    float* row = y + t * ldy;
#pragma GCC ivdep
    for (int64_t c = 0; c < cols; ++c) row[c] = {value};
  }}
}}
"""


def _call_finish(spec: Spec, block: str, cols: str, bias: str) -> str:
    if not spec.bias and not spec.act:
        return ""
    where = bias if spec.bias else "nullptr"
    return f"\n    finish({block}, m, tn, {cols}, {where});"


_TILES = """\
  // Tiles of equal height, at most s.tile tokens: no thread waits for another's sliver.
  const int64_t tiles = ceil_div(rows, s.tile), high = ceil_div(rows, tiles);
"""


_RUN = """\
extern "C" int32_t structc_run(const float* x, const float* w1, const float* w2, const float* bias,
                               float* y, int64_t rows, const Sizes* sizes) {
  try {
    return run(x, w1, w2, bias, y, rows, *sizes);
  } catch (...) {
    return 2;  // out of memory; an exception may not cross into C
  }
}
"""


def _token(spec: Spec) -> str:
    second = _TOKEN_SECOND if spec.factors == 2 else _TOKEN_ONLY
    second = second.replace(
        "@FINISH@", _call_finish(spec, "out", "p2.columns(p)", "bias + block * b2 + p2.start(p)")
    )
    first = ""
    if spec.factors == 2:
        first = (_TOKEN_FIRST_SHUFFLED if spec.permuted else _TOKEN_FIRST) + "\n"
    loops = _TOKEN_LOOPS_2 if spec.factors == 2 else _TOKEN_LOOPS_1
    return _HEAD + _TILES + first + second + loops + "}\n\n" + _RUN


_HEAD = """\
static int32_t run(const float* x, const float* w1, const float* w2, const float* bias, float* y,
                   int64_t rows, const Sizes& s) {
"""

_TOKEN_FIRST = """\
  const int64_t n = s.a1 * s.c1, middle = s.a1 * s.b1;
  const Panels p1(s.b1, s.panel1);
  const int64_t units1 = s.a1 * p1.count;
  // A panel of factor 1 for the tokens t0 .. t0 + tn: h[:, columns] = x[:, block] w1[block].
  auto first = [&](int64_t t0, int64_t tn, int64_t unit, float* h) {
    const int64_t block = unit / p1.count, p = unit % p1.count;
    brgemm(tn, p1.columns(p), s.c1, n, p1.width(p), middle, false, x + t0 * n + block * s.c1,
           w1 + (block * p1.padded() + p1.start(p)) * s.c1,
           h + block * s.b1 + p1.start(p), false);
  };
"""

_TOKEN_FIRST_SHUFFLED = """\
  const int64_t n = s.a1 * s.c1, middle = s.a1 * s.b1;
  // The shuffle costs nothing: each block of factor 1 is cut into one part for each group of
  // factor 2, written where its group reads. Factor 2 is packed with its inputs in that order.
  const int64_t part_width = s.b1 / s.a2;
  const Panels p1(part_width, s.panel1);
  const int64_t units1 = s.a1 * s.a2 * p1.count;
  auto first = [&](int64_t t0, int64_t tn, int64_t unit, float* h) {
    const int64_t part = unit / p1.count, p = unit % p1.count;
    const int64_t block = part / s.a2, group = part % s.a2;
    brgemm(tn, p1.columns(p), s.c1, n, p1.width(p), middle, false, x + t0 * n + block * s.c1,
           w1 + (part * p1.padded() + p1.start(p)) * s.c1,
           h + group * s.c2 + block * part_width + p1.start(p), false);
  };
"""

_TOKEN_SECOND = """\
  const int64_t m = s.a2 * s.b2, b2 = s.b2;
  const Panels p2(s.b2, s.panel2);
  const int64_t units2 = s.a2 * p2.count;
  // A panel of factor 2, written straight to y and finished there.
  auto second = [&](int64_t t0, int64_t tn, int64_t unit, const float* h) {
    const int64_t block = unit / p2.count, p = unit % p2.count;
    float* out = y + t0 * m + block * b2 + p2.start(p);
    brgemm(tn, p2.columns(p), s.c2, middle, p2.width(p), m, false, h + block * s.c2,
           w2 + (block * p2.padded() + p2.start(p)) * s.c2, out, false);@FINISH@
  };
"""

_TOKEN_ONLY = """\
  const int64_t n = s.a1 * s.c1, m = s.a1 * s.b1, b2 = s.b1;
  const Panels p2(s.b1, s.panel2);
  const int64_t units = s.a1 * p2.count;
  // A panel of the factor for the tokens t0 .. t0 + tn, written straight to y and finished there.
  auto only = [&](int64_t t0, int64_t tn, int64_t unit) {
    const int64_t block = unit / p2.count, p = unit % p2.count;
    float* out = y + t0 * m + block * b2 + p2.start(p);
    brgemm(tn, p2.columns(p), s.c1, n, p2.width(p), m, false, x + t0 * n + block * s.c1,
           w1 + (block * p2.padded() + p2.start(p)) * s.c1, out, false);@FINISH@
  };
"""

_TOKEN_LOOPS_2 = """\
  static thread_local Scratch scratch;
  if (s.split && tiles <= 16) {
    // Few rows: the threads share the panels of each factor; all tokens share one intermediate.
    float* h = scratch.get(rows * middle);
    const int32_t failed = parallel(tiles * units1, [&](int64_t task) {
      const int64_t t0 = task / units1 * high;
      if (t0 < rows) first(t0, least(high, rows - t0), task % units1, h + t0 * middle);
    });
    if (failed) return failed;
    return parallel(tiles * units2, [&](int64_t task) {
      const int64_t t0 = task / units2 * high;
      if (t0 < rows) second(t0, least(high, rows - t0), task % units2, h + t0 * middle);
    });
  }
  return parallel(tiles, [&](int64_t tile) {
    const int64_t t0 = tile * high, tn = least(high, rows - t0);
    if (tn <= 0) return;
    float* h = scratch.get(high * middle);
    for (int64_t unit = 0; unit < units1; ++unit) first(t0, tn, unit, h);
    // While factor 2 computes from L1 and L2, the next tile of x comes into L2.
    const int64_t next = least(high, rows - t0 - tn) * n, share = ceil_div(next, units2);
    for (int64_t unit = 0; unit < units2; ++unit) {
      fetch(x + (t0 + tn) * n + unit * share, least(share, next - unit * share));
      second(t0, tn, unit, h);
    }
  });
"""

_TOKEN_LOOPS_1 = """\
  if (s.split)  // few rows: the threads share the panels
    return parallel(tiles * units, [&](int64_t task) {
      const int64_t t0 = task / units * high;
      if (t0 < rows) only(t0, least(high, rows - t0), task % units);
    });
  return parallel(tiles, [&](int64_t tile) {
    const int64_t t0 = tile * high, tn = least(high, rows - t0);
    for (int64_t unit = 0; tn > 0 && unit < units; ++unit) only(t0, tn, unit);
  });
"""


def _feature(spec: Spec) -> str:
    second = _FEATURE_SECOND if spec.factors == 2 else _FEATURE_ONLY
    second = second.replace(
        "@FINISH@", _call_finish(spec, "y + t0 * m + from", "many", "bias + from")
    )
    first = _FEATURE_FIRST if spec.factors == 2 else ""
    row, stride = ("block", "s.a1 * pad") if spec.permuted else ("block * s.b1", "pad")
    first = first.replace("@ROW@", row).replace("@STRIDE@", stride)
    loops = _FEATURE_LOOPS_2 if spec.factors == 2 else _FEATURE_LOOPS_1
    return _FEATURE_CUT + _HEAD + _TILES + _FEATURE_PAD + first + second + loops + "}\n\n" + _RUN


_FEATURE_CUT = """\
// Blocks are served in units of about 64 rows: several thin ones, or a piece of a thick one.
struct Units {
  int64_t blocks, height, group, piece, pieces;
  Units(int64_t blocks, int64_t height) : blocks(blocks), height(height) {
    group = height < 64 ? least(blocks, 64 / height) : 1;
    piece = least(height, 96);
    pieces = ceil_div(height, piece);
  }
  int64_t count() const { return ceil_div(blocks, group) * pieces; }
  int64_t room() const { return group * piece; }
};

"""

_FEATURE_PAD = """\
  // Tokens of a tile in memory: whole vectors. What lies between the tokens and the end is zero
  // in x and never reaches y.
  const int64_t pad = 16 * ceil_div(high, 16);
  // Features as rows: xt[c][t] = x[t0 + t][from + c], from column \"from\" on.
  auto columns = [&](const float* from, int64_t ld, int64_t tn, int64_t many, float* xt) {
    transpose(from, ld, xt, pad, tn, many);
    for (int64_t c = 0; tn < pad && c < many; ++c)
      std::memset(xt + c * pad + tn, 0, (pad - tn) * sizeof(float));
  };
"""

_FEATURE_FIRST = """\
  const int64_t n = s.a1 * s.c1, middle = s.a1 * s.b1;
  // Input blocks are transposed a few at a time: what was just written is multiplied from L1 or L2.
  const int64_t group1 = s.c1 < 64 ? least(s.a1, 64 / s.c1) : 1, units1 = ceil_div(s.a1, group1);
  auto first = [&](int64_t t0, int64_t tn, int64_t unit, float* h, float* xt) {
    const int64_t begin = unit * group1, end = least(begin + group1, s.a1);
    columns(x + t0 * n + begin * s.c1, n, tn, (end - begin) * s.c1, xt);
    for (int64_t block = begin; block < end; ++block)
      brgemm(s.b1, pad, s.c1, s.c1, pad, @STRIDE@, false, w1 + block * s.b1 * s.c1,
             xt + (block - begin) * s.c1 * pad, h + @ROW@ * pad, false);
  };
"""

_FEATURE_SECOND = """\
  const int64_t m = s.a2 * s.b2;
  const Units u(s.a2, s.b2);
  // A unit of factor 2, transposed back into y and finished there.
  auto second = [&](int64_t t0, int64_t tn, int64_t unit, const float* h, float* z) {
    const int64_t begin = unit / u.pieces * u.group, end = least(begin + u.group, s.a2);
    const int64_t row = unit % u.pieces * u.piece, tall = least(u.piece, s.b2 - row);
    for (int64_t block = begin; block < end; ++block)
      brgemm(tall, pad, s.c2, s.c2, pad, pad, false, w2 + (block * s.b2 + row) * s.c2,
             h + block * s.c2 * pad, z + (block - begin) * s.b2 * pad, false);
    const int64_t from = begin * s.b2 + row, many = (end - begin - 1) * s.b2 + tall;
    transpose(z, pad, y + t0 * m + from, m, many, tn);@FINISH@
  };
"""

_FEATURE_ONLY = """\
  const int64_t n = s.a1 * s.c1, m = s.a1 * s.b1;
  const Units u(s.a1, s.b1);
  // Input blocks lo .. hi of a tile, features as rows.
  auto load = [&](int64_t t0, int64_t tn, int64_t lo, int64_t hi, float* xt) {
    columns(x + t0 * n + lo * s.c1, n, tn, (hi - lo) * s.c1, xt);
  };
  // A unit of the factor, from input blocks that start at block lo, transposed back into y.
  auto only = [&](int64_t t0, int64_t tn, int64_t unit, int64_t lo, const float* xt, float* z) {
    const int64_t begin = unit / u.pieces * u.group, end = least(begin + u.group, s.a1);
    const int64_t row = unit % u.pieces * u.piece, tall = least(u.piece, s.b1 - row);
    for (int64_t block = begin; block < end; ++block)
      brgemm(tall, pad, s.c1, s.c1, pad, pad, false, w1 + (block * s.b1 + row) * s.c1,
             xt + (block - lo) * s.c1 * pad, z + (block - begin) * s.b1 * pad, false);
    const int64_t from = begin * s.b1 + row, many = (end - begin - 1) * s.b1 + tall;
    transpose(z, pad, y + t0 * m + from, m, many, tn);@FINISH@
  };
"""

_FEATURE_LOOPS_2 = """\
  static thread_local Scratch memory, shared;
  const int64_t room = least(s.a1, group1) * s.c1 * pad, units2 = u.count();
  if (s.split && tiles <= 16) {
    // Few rows: the threads share the blocks of each factor, and all tokens share one intermediate.
    float* h = shared.get(tiles * middle * pad);
    const int32_t failed = parallel(tiles * units1, [&](int64_t task) {
      const int64_t tile = task / units1, t0 = tile * high;
      if (t0 < rows)
        first(t0, least(high, rows - t0), task % units1, h + tile * middle * pad, memory.get(room));
    });
    if (failed) return failed;
    return parallel(tiles * units2, [&](int64_t task) {
      const int64_t tile = task / units2, t0 = tile * high;
      if (t0 < rows)
        second(t0, least(high, rows - t0), task % units2, h + tile * middle * pad,
               memory.get(u.room() * pad));
    });
  }
  return parallel(tiles, [&](int64_t tile) {
    const int64_t t0 = tile * high, tn = least(high, rows - t0);
    if (tn <= 0) return;
    float* h = memory.get((middle + u.room()) * pad + room);
    float *z = h + middle * pad, *xt = z + u.room() * pad;
    for (int64_t unit = 0; unit < units1; ++unit) first(t0, tn, unit, h, xt);
    for (int64_t unit = 0; unit < units2; ++unit) second(t0, tn, unit, h, z);
  });
"""

_FEATURE_LOOPS_1 = """\
  static thread_local Scratch memory;
  const int64_t units = u.count(), room = u.group * s.c1 * pad;
  // One group of blocks of one tile: its inputs are transposed once for all pieces.
  auto serve = [&](int64_t t0, int64_t tn, int64_t group) {
    const int64_t lo = group * u.group, hi = least(lo + u.group, s.a1);
    float* xt = memory.get(room + u.room() * pad);
    load(t0, tn, lo, hi, xt);
    for (int64_t piece = 0; piece < u.pieces; ++piece)
      only(t0, tn, group * u.pieces + piece, lo, xt, xt + room);
  };
  const int64_t groups = units / u.pieces;
  if (s.split)  // few rows: the threads share the groups of blocks
    return parallel(tiles * groups, [&](int64_t task) {
      const int64_t t0 = task / groups * high;
      if (t0 < rows) serve(t0, least(high, rows - t0), task % groups);
    });
  return parallel(tiles, [&](int64_t tile) {
    const int64_t t0 = tile * high, tn = least(high, rows - t0);
    for (int64_t group = 0; tn > 0 && group < groups; ++group) serve(t0, tn, group);
  });
"""
