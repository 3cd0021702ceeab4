"""The Triton source of polynomial attention: states of monomials, outputs, and the gradient.

``o_i = sum_j e^{-decay (i - j)} f(q_i . k_j) v_j / (the same with 1 for v_j)``. With monomials phi
and their weights w, ``f(q . k) = sum_f w_f phi_f(q) phi_f(k)``; keys and values become one matrix a
chunk, kept in memory: no chip has room for ``D e`` numbers. A chunk's own keys are met as scores.

- ``states``: what stands before each chunk (or behind, ``BACK``), some monomials a program, in
  order over the chunks.
- ``outputs``: a tile of queries; all monomials of the state before its chunk, then the chunk.
- ``queries``, ``keys``: the gradients. A monomial's derivative goes to the features it is made of
  as a product with the matrix that says which they are.
"""

from structc.codegen.triton.method_kernel import START

_TABLES = {"places": "i32", "weights": "fp32", "slopes": "fp32", "f": "fp32"}
_STATE = {"state": "sum", "mass": "fp32"}
_GIVEN = {"q": "", "k": "", "v": ""}
_BACK = {**_GIVEN, "grad": "", "z": "fp32", "dots": "fp32", **_TABLES, **_STATE}
POINTERS = {
    "states": {
        "x": "", "y": "", "z": "fp32", "dots": "fp32", "places": "i32", "slopes": "fp32", **_STATE,
    },
    "outputs": {**_GIVEN, **_TABLES, **_STATE, "o": "", "z": "fp32"},
    "queries": {**_BACK, "dq": ""},
    "keys": {**_BACK, "dk": "", "dv": ""},
}  # fmt: skip
"""Tensors of each kernel, in order, and what they hold."""
STRIDES = {"states": ("x", "y"), "outputs": ("q", "k", "v"), "queries": ("q", "k", "v", "g"),
           "keys": ("q", "k", "v", "g")}  # fmt: skip
"""Whose strides of batch, head and token follow."""
LENGTHS = {
    "states": ("heads", "length", "skip", "chunk", "chunks", "count", "d", "e"),
    **dict.fromkeys(
        ("outputs", "queries", "keys"),
        ("heads", "queries", "keys", "chunk", "chunks", "count", "d", "e"),
    ),
}  # fmt: skip
"""Then sizes: ``count`` monomials, heads of ``d`` and of ``e`` numbers."""

SOURCE = (
    START
    + '''

@triton.jit
def monomials(x, rows, step, inside, places, m, count, d, WITHOUT: tl.constexpr,
              DEGREE: tl.constexpr):
    """products of the features that each monomial names, but for its factor WITHOUT"""
    found = tl.full((rows.shape[0], m.shape[0]), 1.0, tl.float32)
    for p in tl.static_range(DEGREE):
        if p != WITHOUT:
            place = tl.load(places + p * count + m, mask=m < count, other=d)
            at = rows.to(tl.int64)[:, None] * step + place[None, :]
            there = inside[:, None] & (place < d)[None, :]
            found *= tl.load(x + at, mask=there, other=1.0).to(tl.float32)
    return found


@triton.jit
def value_of(f, s, DEGREE: tl.constexpr):
    """the polynomial"""
    found = tl.full(s.shape, 0.0, tl.float32)
    for p in tl.static_range(DEGREE + 1):
        found = found * s + tl.load(f + DEGREE - p)
    return found


@triton.jit
def slope_of(f, s, DEGREE: tl.constexpr):
    """its derivative"""
    found = tl.full(s.shape, 0.0, tl.float32)
    for p in tl.static_range(DEGREE):
        found = found * s + (DEGREE - p) * tl.load(f + DEGREE - p)
    return found


@triton.jit
def pulled(more, x, rows, step, inside, places, m, count, d, r, DEGREE: tl.constexpr,
           DOT: tl.constexpr, TF32: tl.constexpr):
    """the gradient of x where more is that of its monomials: a product with the matrix that says
    which features each is made of"""
    found = tl.zeros((rows.shape[0], r.shape[0]), tl.float32)
    for p in tl.static_range(DEGREE):
        rest = monomials(x, rows, step, inside, places, m, count, d, p, DEGREE)
        place = tl.load(places + p * count + m, mask=m < count, other=-1)
        which = (place[:, None] == r[None, :]).to(tl.float32)
        found += times(more * rest, which, DOT, TF32)
    return found


@triton.jit
def head_of(x, one, heads, batch, head):
    """where a head begins"""
    return x + one // heads * batch + one % heads * head


@triton.jit(do_not_specialize=["heads", "length", "skip", "chunk", "chunks", "count"])
def polynomial_states(x, y, z, dots, places, slopes, state, mass, xb, xh, xn, yb, yh, yn,
                      heads, length, skip, chunk, chunks, count, d, e,
                      BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
                      DEGREE: tl.constexpr, BACK: tl.constexpr, DECAY: tl.constexpr,
                      DOT: tl.constexpr, TF32: tl.constexpr):
    """sums of monomials of x times y and times 1, before each chunk; BACK: y / z and -dots / z,
    behind each chunk"""
    tiles = tl.cdiv(count, BK)
    pid = tl.program_id(0)
    one = (pid // tiles).to(tl.int64)
    m = pid % tiles * BK + tl.arange(0, BK)
    c = tl.arange(0, WIDE)
    x = head_of(x, one, heads, xb, xh)
    y = head_of(y, one, heads, yb, yh)
    sums = tl.zeros((BK, WIDE), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    fall = 0.0
    if DECAY:
        fall = tl.load(slopes + one % heads)
    for turn in range(chunks):
        now = turn
        slot = turn
        if BACK:
            now = chunks - 1 - turn
            slot = now + 1
        place = (one * (chunks + 1) + slot) * count + m
        inside = (m < count)[:, None] & (c < e)[None, :]
        tl.store(state + place[:, None] * e + c[None, :], sums.to(state.dtype.element_ty),
                 mask=inside)
        tl.store(mass + place, total, mask=m < count)
        if DECAY:
            sums *= tl.exp(-fall * chunk)
            total *= tl.exp(-fall * chunk)
        for start in range(now * chunk, tl.minimum(length, now * chunk + chunk), BN):
            j = start + tl.arange(0, BN)
            there = (j < length) & (j >= skip)
            found = monomials(x, j, xn, there, places, m, count, d, -1, DEGREE)
            value = tile(y, j[:, None], c[None, :], yn, length, e).to(tl.float32)
            if BACK:
                share = 1.0 / tl.load(z + one * length + j, mask=there, other=1.0)
                part = -share * tl.load(dots + one * length + j, mask=there, other=0.0)
                if DECAY:
                    age = tl.exp(-fall * (j - now * chunk))
                    share *= age
                    part *= age
                value *= share[:, None]
            else:
                part = there.to(tl.float32)
                if DECAY:
                    part *= tl.exp(-fall * (now * chunk + chunk - 1 - j))
                value *= part[:, None]
            sums += times(tl.trans(found), value, DOT, TF32)
            total += tl.sum(found * part[:, None], 0)
    end = chunks
    if BACK:
        end = 0
    place = (one * (chunks + 1) + end) * count + m
    inside = (m < count)[:, None] & (c < e)[None, :]
    tl.store(state + place[:, None] * e + c[None, :], sums.to(state.dtype.element_ty), mask=inside)
    tl.store(mass + place, total, mask=m < count)


@triton.jit(do_not_specialize=["heads", "queries", "keys", "chunk", "chunks", "count"])
def polynomial_outputs(q, k, v, places, weights, slopes, f, state, mass, o, z,
                       qb, qh, qn, kb, kh, kn, vb, vh, vn,
                       heads, queries, keys, chunk, chunks, count, d, e,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WD: tl.constexpr,
                       WIDE: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr,
                       DECAY: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr):
    """the output of a tile of queries, and what it was divided by"""
    tiles = tl.cdiv(queries, BM)
    pid = tl.program_id(0)
    one = (pid // tiles).to(tl.int64)
    first = pid % tiles * BM
    i = first + tl.arange(0, BM)
    r = tl.arange(0, WD)
    c = tl.arange(0, WIDE)
    q = head_of(q, one, heads, qb, qh)
    k = head_of(k, one, heads, kb, kh)
    v = head_of(v, one, heads, vb, vh)
    own = chunks
    if CAUSAL:
        own = tl.minimum(first // chunk, chunks)
    sums = tl.zeros((BM, WIDE), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if own > 0:
        base = (one * (chunks + 1) + own) * count
        for start in range(0, count, BK):
            m = start + tl.arange(0, BK)
            found = monomials(q, i, qn, i < queries, places, m, count, d, -1, DEGREE)
            found *= tl.load(weights + m, mask=m < count, other=0.0)[None, :]
            before = tile(state + base * e, m[:, None], c[None, :], e, count, e)
            sums += times(found, before, DOT, TF32)
            total += tl.sum(found * tl.load(mass + base + m, mask=m < count, other=0.0)[None, :], 1)
    if CAUSAL:
        fall = 0.0
        if DECAY:
            fall = tl.load(slopes + one % heads)
            age = tl.exp(-fall * (i - own * chunk + 1))
            sums *= age[:, None]
            total *= age
        left = tile(q, i[:, None], r[None, :], qn, queries, d)
        for start in range(own * chunk, tl.minimum(keys, first + BM), BN):
            j = start + tl.arange(0, BN)
            right = tile(k, j[None, :], r[:, None], kn, keys, d)
            p = value_of(f, times(left, right, DOT, TF32), DEGREE)
            lag = i[:, None] - j[None, :]
            if DECAY:
                p *= tl.exp(-fall * tl.maximum(lag, 0))
            p = tl.where((lag >= 0) & (j < keys)[None, :], p, 0.0)
            value = tile(v, j[:, None], c[None, :], vn, keys, e)
            sums += times(p, value, DOT, TF32)
            total += tl.sum(p, 1)
    row = one * queries + i
    tl.store(z + row, total, mask=i < queries)
    inside = (i < queries)[:, None] & (c < e)[None, :]
    tl.store(o + row[:, None] * e + c[None, :], (sums / total[:, None]).to(o.dtype.element_ty),
             mask=inside)


@triton.jit(do_not_specialize=["heads", "queries", "keys", "chunk", "chunks", "count"])
def polynomial_queries(q, k, v, grad, z, dots, places, weights, slopes, f, state, mass, dq,
                       qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn,
                       heads, queries, keys, chunk, chunks, count, d, e,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WD: tl.constexpr,
                       WIDE: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr,
                       DECAY: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr):
    """the gradient of a tile of queries"""
    tiles = tl.cdiv(queries, BM)
    pid = tl.program_id(0)
    one = (pid // tiles).to(tl.int64)
    first = pid % tiles * BM
    i = first + tl.arange(0, BM)
    r = tl.arange(0, WD)
    c = tl.arange(0, WIDE)
    q = head_of(q, one, heads, qb, qh)
    k = head_of(k, one, heads, kb, kh)
    v = head_of(v, one, heads, vb, vh)
    grad = head_of(grad, one, heads, gb, gh)
    slope = tile(grad, i[:, None], c[None, :], gn, queries, e)
    dot = tl.load(dots + one * queries + i, mask=i < queries, other=0.0)
    share = 1.0 / tl.load(z + one * queries + i, mask=i < queries, other=1.0)
    own = chunks
    if CAUSAL:
        own = tl.minimum(first // chunk, chunks)
    found = tl.zeros((BM, WD), tl.float32)
    if own > 0:
        base = (one * (chunks + 1) + own) * count
        for start in range(0, count, BK):
            m = start + tl.arange(0, BK)
            before = tile(state + base * e, m[None, :], c[:, None], e, count, e)
            more = times(slope, before, DOT, TF32)
            more -= dot[:, None] * tl.load(mass + base + m, mask=m < count, other=0.0)[None, :]
            more *= tl.load(weights + m, mask=m < count, other=0.0)[None, :]
            found += pulled(more, q, i, qn, i < queries, places, m, count, d, r, DEGREE, DOT, TF32)
    if CAUSAL:
        fall = 0.0
        if DECAY:
            fall = tl.load(slopes + one % heads)
            found *= tl.exp(-fall * (i - own * chunk + 1))[:, None]
        left = tile(q, i[:, None], r[None, :], qn, queries, d)
        for start in range(own * chunk, tl.minimum(keys, first + BM), BN):
            j = start + tl.arange(0, BN)
            right = tile(k, j[None, :], r[:, None], kn, keys, d)
            across = tile(v, j[None, :], c[:, None], vn, keys, e)
            ds = slope_of(f, times(left, right, DOT, TF32), DEGREE)
            ds *= times(slope, across, DOT, TF32) - dot[:, None]
            lag = i[:, None] - j[None, :]
            if DECAY:
                ds *= tl.exp(-fall * tl.maximum(lag, 0))
            ds = tl.where((lag >= 0) & (j < keys)[None, :], ds, 0.0)
            found += times(ds, tl.trans(right), DOT, TF32)
    inside = (i < queries)[:, None] & (r < d)[None, :]
    at = (one * queries + i)[:, None] * d + r[None, :]
    tl.store(dq + at, (found * share[:, None]).to(dq.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "queries", "keys", "chunk", "chunks", "count"])
def polynomial_keys(q, k, v, grad, z, dots, places, weights, slopes, f, state, mass, dk, dv,
                    qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn,
                    heads, queries, keys, chunk, chunks, count, d, e,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WD: tl.constexpr,
                    WIDE: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr,
                    DECAY: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr):
    """the gradients of a tile of keys and of its values"""
    tiles = tl.cdiv(keys, BN)
    pid = tl.program_id(0)
    one = (pid // tiles).to(tl.int64)
    first = pid % tiles * BN
    j = first + tl.arange(0, BN)
    r = tl.arange(0, WD)
    c = tl.arange(0, WIDE)
    q = head_of(q, one, heads, qb, qh)
    k = head_of(k, one, heads, kb, kh)
    v = head_of(v, one, heads, vb, vh)
    grad = head_of(grad, one, heads, gb, gh)
    value = tile(v, j[:, None], c[None, :], vn, keys, e)
    slot = 0
    if CAUSAL:
        slot = tl.minimum(first // chunk + 1, chunks)
    sums_k = tl.zeros((BN, WD), tl.float32)
    sums_v = tl.zeros((BN, WIDE), tl.float32)
    base = (one * (chunks + 1) + slot) * count
    if slot < chunks:
        for start in range(0, count, BK):
            m = start + tl.arange(0, BK)
            behind = tile(state + base * e, m[None, :], c[:, None], e, count, e)
            weight = tl.load(weights + m, mask=m < count, other=0.0)
            found = monomials(k, j, kn, j < keys, places, m, count, d, -1, DEGREE)
            sums_v += times(found * weight[None, :], tl.trans(behind), DOT, TF32)
            more = times(value, behind, DOT, TF32)
            more += tl.load(mass + base + m, mask=m < count, other=0.0)[None, :]
            more *= weight[None, :]
            sums_k += pulled(more, k, j, kn, j < keys, places, m, count, d, r, DEGREE, DOT, TF32)
    if CAUSAL:
        fall = 0.0
        if DECAY:
            fall = tl.load(slopes + one % heads)
            age = tl.exp(-fall * (first // chunk * chunk + chunk - j))
            sums_k *= age[:, None]
            sums_v *= age[:, None]
        right = tile(k, j[:, None], r[None, :], kn, keys, d)
        end = tl.minimum(queries, first // chunk * chunk + chunk)
        for start in range(first // BM * BM, end, BM):
            i = start + tl.arange(0, BM)
            left = tile(q, i[None, :], r[:, None], qn, queries, d)
            share = 1.0 / tl.load(z + one * queries + i, mask=i < queries, other=1.0)
            dot = tl.load(dots + one * queries + i, mask=i < queries, other=0.0)
            slope = tile(grad, i[:, None], c[None, :], gn, queries, e).to(tl.float32)
            slope *= share[:, None]
            s = times(right, left, DOT, TF32)
            lag = i[None, :] - j[:, None]
            near = tl.where((lag >= 0) & (i < queries)[None, :], 1.0, 0.0)
            if DECAY:
                near *= tl.exp(-fall * tl.maximum(lag, 0))
            sums_v += times(value_of(f, s, DEGREE) * near, slope, DOT, TF32)
            ds = times(value, tl.trans(slope), DOT, TF32) - (dot * share)[None, :]
            ds *= slope_of(f, s, DEGREE) * near
            sums_k += times(ds, tl.trans(left), DOT, TF32)
    at = (one * keys + j)[:, None] * d + r[None, :]
    tl.store(dk + at, sums_k.to(dk.dtype.element_ty), mask=(j < keys)[:, None] & (r < d)[None, :])
    at = (one * keys + j)[:, None] * e + c[None, :]
    tl.store(dv + at, sums_v.to(dv.dtype.element_ty), mask=(j < keys)[:, None] & (c < e)[None, :])
'''
)
"""All four kernels."""
