"""``sum_j f(q_i k_j) x_j`` for a polynomial f through monomials, with a gradient that holds little.

Forward and backward are scans over slabs of tokens. What lives between them are q, k and x alone;
features, and the matrix that keys and values become, are computed again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from structc.attention.base import causal_mask

CHUNK = 128
"""Queries of the causal form that meet each other in full."""
SLAB = 1 << 19
"""Numbers of features that exist at a time."""


@lru_cache(maxsize=64)
def monomials(dims: int, degree: int) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
    """Exponents as sorted lists of dimensions, and the multinomial of each.

    ``(x . y)^p = sum_alpha multinomial(alpha) x^alpha y^alpha`` over ``|alpha| = p``.

    >>> monomials(2, 2)[0]
    ((), (0,), (1,), (0, 0), (0, 1), (1, 1))
    """
    found, counts = [], []
    for p in range(degree + 1):
        for chosen in itertools.combinations_with_replacement(range(dims), p):
            repeats = math.prod(math.factorial(chosen.count(c)) for c in set(chosen))
            found.append(chosen)
            counts.append(math.factorial(p) / repeats)
    return tuple(found), tuple(counts)


@lru_cache(maxsize=64)
def ranks(dims: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each monomial the degree, and the multinomial."""
    chosen, counts = monomials(dims, degree)
    return np.array([len(c) for c in chosen]), np.array(counts)


def weights_of(a: Sequence[float], dims: int) -> Tensor:
    """``a_p multinomial`` of each monomial, float64.

    >>> weights_of((1.0, 1.0, 0.5), 2).tolist()
    [1.0, 1.0, 1.0, 0.5, 1.0, 0.5]
    """
    orders, counts = ranks(dims, len(a) - 1)
    return torch.tensor(np.asarray(a)[orders] * counts, dtype=torch.float64)


def features(x: Tensor, degree: int) -> Tensor:
    """All monomials of the last dimension up to a degree, ``(..., C(d + degree, degree))``."""
    rank, dims = [x.new_ones(*x.shape[:-1], 1)], x.shape[-1]
    starts = list(range(dims + 1))  # of what each leading dimension multiplies, in the rank below
    for p in range(1, degree + 1):
        below = rank[-1]
        if p == 1:
            rank.append(x)
            continue
        rank.append(
            torch.cat([x[..., c : c + 1] * below[..., starts[c] :] for c in range(dims)], -1)
        )
        widths = [below.shape[-1] - starts[c] for c in range(dims)]
        starts = [0, *itertools.accumulate(widths)]
    return torch.cat(rank, -1)


@dataclass(frozen=True)
class Rule:
    """``f(s) = sum_p a_p s^p``, and which pairs of query and key it is summed over.

    Attributes:
        a: coefficients, the constant first.
        causal: ``j <= i`` alone; then the weight of a pair also falls by ``decay`` a lag.
    """

    a: tuple[float, ...]
    causal: bool = False

    @property
    def degree(self) -> int:
        """Of f."""
        return len(self.a) - 1

    def f(self, scores: Tensor) -> Tensor:
        """The polynomial."""
        return _horner(self.a, scores)

    def slope(self, scores: Tensor) -> Tensor:
        """Its derivative."""
        return _horner(tuple(p * a for p, a in enumerate(self.a))[1:], scores)


def _horner(a: tuple[float, ...], s: Tensor) -> Tensor:
    found = torch.full_like(s, a[-1])
    for coefficient in a[-2::-1]:
        found = found * s + coefficient
    return found


def feature_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    decay: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    kernel: Any = None,
) -> Tensor:
    """Rows of :func:`feature_sums` of ``[v, 1]``, divided by their last number.

    Args:
        q, k: in at least float32; a kernel takes them in v's dtype.
        weights: of each monomial, if not those of the rule: no kernel knows others.
        kernel: ``(q, k, v, rule, decay)`` to output and divisors, or None where the scan is to run;
            ``serves(q, k, v)`` says whether it may be asked, ``backward`` gives gradients.

    >>> q, k, v = torch.randn(3, 1, 1, 9, 2).unbind(0)
    >>> even = feature_attention(q, k, v, Rule((1.0,)))
    >>> torch.allclose(even, v.mean(2, keepdim=True).expand_as(v), atol=1e-6)
    True
    """
    if kernel is None or weights is not None or not kernel.serves(q, k, v):
        return _divided(q, k, v, decay, rule, weights)
    found: Tensor = _Kernel.apply(q.to(v.dtype), k.to(v.dtype), v, decay, rule, kernel)
    return found


def _divided(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    rule: Rule,
    weights: Tensor | None = None,
) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if weights is None:
        weights = weights_of(rule.a, q.shape[-1]).to(q.device, wide)
    x = torch.cat([v.to(wide), v.new_ones(*v.shape[:3], 1, dtype=wide)], -1)
    y = feature_sums(q.to(wide), k.to(wide), x, rule, weights, decay)
    return (y[..., :-1] / y[..., -1:]).to(v.dtype)


class _Kernel(torch.autograd.Function):
    """Forward and backward by a kernel; by the scan what it does not serve."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        rule: Rule,
        kernel: Any,
    ) -> Tensor:
        done = kernel(q, k, v, rule, decay)
        o, z = done or (_divided(q, k, v, decay, rule), None)
        ctx.save_for_backward(q, k, v, decay, o, z)
        ctx.rule, ctx.kernel = rule, kernel
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, o, z = ctx.saved_tensors
        rest = (None, None, None)
        if z is not None and not torch.is_grad_enabled():
            given = ctx.kernel.backward(q, k, v, ctx.rule, decay, o, z, grads[0])
            if given is not None:
                return (*given, *rest)
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = [t.view_as(t) if again else t.detach().requires_grad_() for t in (q, k, v)]
            y = _divided(leaves[0], leaves[1], leaves[2], decay, ctx.rule)
        asked = [t for t in leaves if t.requires_grad]
        found = iter(torch.autograd.grad(y, asked, grads[0], create_graph=again))
        return (*(next(found) if t.requires_grad else None for t in leaves), *rest)


def feature_sums(
    q: Tensor, k: Tensor, x: Tensor, rule: Rule, weights: Tensor, decay: Tensor | None = None
) -> Tensor:
    """``y_i = sum_j e^{-decay (i - j)} f(q_i . k_j) x_j``.

    Args:
        q: ``(B, H, n, d)``; k: ``(B, H, m, d)``; x: ``(B, H, m, e)``; y: ``(B, H, n, e)``.
        rule: f, and whether later keys are hidden.
        weights: of each feature, ``a_p multinomial``.
        decay: ``(H,)``, at least 0, for the causal form.

    With ``g = dy``, ``dx = f(S)^T g`` and ``dS = f'(S) (g x^T)`` are sums of the same kind: those
    over earlier keys come of the same states as y, those over later queries of states that a scan
    from the end adds up.

    Cost:    ``2 n D (e + 1)`` flops each way forward, about three times that backward. Memory
             beyond the inputs and y: ``SLAB`` features and a state of ``D e`` numbers a head.

    >>> q, k, x = torch.randn(3, 1, 1, 9, 2).unbind(0)
    >>> rule, (_, counts) = Rule((1.0, 1.0), causal=True), monomials(2, 1)
    >>> want = (1 + q @ k.mT).tril() @ x
    >>> torch.allclose(feature_sums(q, k, x, rule, torch.tensor(counts)), want, atol=1e-5)
    True
    """
    found: Tensor = _Sums.apply(q, k, x, weights, decay, rule)
    return found


class _Sums(torch.autograd.Function):
    """The scan, and its gradient by two more."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, x: Tensor, weights: Tensor, decay: Tensor | None, rule: Rule
    ) -> Tensor:
        ctx.save_for_backward(q, k, x, weights, decay)
        ctx.rule = rule
        return _forward(q, k, x, weights, decay, rule)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, x, weights, decay = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient: through the scan as it stands
            leaves = [t.view_as(t) for t in (q, k, x)]  # q, k and x may come from each other
            y = _forward(leaves[0], leaves[1], leaves[2], weights, decay, ctx.rule)
            asked = [t for t in leaves if t.requires_grad]
            found = iter(torch.autograd.grad(y, asked, grads[0], create_graph=True))
            given = [next(found) if t.requires_grad else None for t in leaves]
            return (*given, None, None, None)
        backward = _causal_backward if ctx.rule.causal else _whole_backward
        return (*backward(q, k, x, grads[0], weights, decay, ctx.rule), None, None, None)


def _forward(
    q: Tensor, k: Tensor, x: Tensor, weights: Tensor, decay: Tensor | None, rule: Rule
) -> Tensor:
    return (_causal if rule.causal else _whole)(q, k, x, weights, decay, rule)


def _whole(
    q: Tensor, k: Tensor, x: Tensor, weights: Tensor, decay: Tensor | None, rule: Rule
) -> Tensor:
    step, degree = _step(q, weights), rule.degree
    state = _state(k, x, degree, step)
    parts = [(features(part, degree) * weights) @ state for part in q.split(step, 2)]
    return torch.cat(parts, 2)


def _step(q: Tensor, weights: Tensor) -> int:
    """Tokens whose features exist at a time."""
    return max(1, SLAB // max(1, len(weights) * q.shape[0] * q.shape[1]))


def _state(k: Tensor, x: Tensor, degree: int, step: int) -> Tensor:
    """``phi(k)^T x``."""
    parts = zip(k.split(step, 2), x.split(step, 2), strict=True)
    found: Tensor = sum(features(a, degree).mT @ b for a, b in parts)
    return found


def _pulled(x: Tensor, degree: int, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Features, and the gradient of x where ``grad`` is theirs."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        phi = features(leaf, degree)
    return phi.detach(), torch.autograd.grad(phi, leaf, grad)[0]


def _whole_backward(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    g: Tensor,
    weights: Tensor,
    decay: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    step, degree = _step(q, weights), rule.degree
    state = _state(k, x, degree, step) * weights[:, None]
    back, dq, dk, dx = torch.zeros_like(state), [], [], []
    for part, some in zip(q.split(step, 2), g.split(step, 2), strict=True):
        phi, grad = _pulled(part, degree, some @ state.mT)
        back += phi.mT @ some
        dq.append(grad)
    back *= weights[:, None]
    for part, some in zip(k.split(step, 2), x.split(step, 2), strict=True):
        phi, grad = _pulled(part, degree, some @ back.mT)
        dk.append(grad)
        dx.append(phi @ back)
    return torch.cat(dq, 2), torch.cat(dk, 2), torch.cat(dx, 2)


@dataclass(frozen=True)
class _Decay:
    """Powers of what a lag weighs; without decay all are 1.

    Attributes:
        near: ``(CHUNK, CHUNK)`` or with heads in front, pairs inside a chunk, 0 above the diagonal.
        since: ``(H, 1, CHUNK, 1)``, a query from what the state before its chunk holds.
        until: the same for keys, to the end of their chunk.
        chunk: ``(H, 1, 1, 1)``, over a whole chunk.
    """

    near: Tensor
    since: Tensor | float = 1.0
    until: Tensor | float = 1.0
    chunk: Tensor | float = 1.0

    @staticmethod
    def of(decay: Tensor | None, like: Tensor) -> _Decay:
        """For chunks of this length; the state counts from the last key of its chunk."""
        lower = causal_mask(CHUNK, CHUNK, like.device).to(like.dtype)
        if decay is None:
            return _Decay(lower)
        place = torch.arange(CHUNK, dtype=like.dtype, device=like.device)
        m = decay.to(like.dtype)[:, None, None, None]
        lag = (place[:, None] - place).clamp(min=0)
        since, until = (place + 1)[:, None], (CHUNK - 1 - place)[:, None]
        return _Decay(
            (-m * lag).exp() * lower,
            (-m * since).exp(),
            (-m * until).exp(),
            (-m * CHUNK).exp(),
        )


def _chunked(t: Tensor, whole: int, n: int) -> Tensor:
    """(B, H, n, e) as (B, H, chunks, CHUNK, e), zeros at the end; what is past n is left out."""
    t = t[:, :, :n]
    return F.pad(t, (0, 0, 0, whole - t.shape[2])).unflatten(2, (-1, CHUNK))


def _groups(
    tensors: tuple[Tensor, ...], n: int, weights: Tensor, decay: Tensor | None
) -> Iterator[tuple[Tensor, ...]]:
    """Several chunks at a time, as many as features have room for; one where they decay."""
    whole = -(-n // CHUNK) * CHUNK
    parts = [_chunked(t, whole, n) for t in tensors]
    heads = parts[0].shape[0] * parts[0].shape[1]
    numbers = heads * len(weights) * (tensors[2].shape[-1] + CHUNK)
    together = 1 if decay is not None else max(1, SLAB // max(1, numbers))
    return zip(*(t.split(together, 2) for t in parts), strict=True)


def _before(sums: Tensor, state: Tensor) -> Tensor:
    """What stands ahead of each chunk: the state, and the chunks of the group before it."""
    if sums.shape[2] == 1:
        return state[:, :, None]
    running = sums.cumsum(2)
    return torch.cat([torch.zeros_like(sums[:, :, :1]), running[:, :, :-1]], 2) + state[:, :, None]


def _causal(
    q: Tensor, k: Tensor, x: Tensor, weights: Tensor, decay: Tensor | None, rule: Rule
) -> Tensor:
    """Chunks meet themselves in full, and all before them as one matrix."""
    n, d = q.shape[2], _Decay.of(decay, q)
    state, found = x.new_zeros(*q.shape[:2], len(weights), x.shape[-1]), []
    for queries, keys, values in _groups((q, k, x), n, weights, decay):
        sums = features(keys, rule.degree).mT @ (d.until * values)
        near = (rule.f(queries @ keys.mT) * d.near) @ values
        far = (features(queries, rule.degree) * weights) @ _before(sums, state)
        found.append((near + d.since * far).flatten(2, 3))
        state = _kept(d.chunk, state) + sums.sum(2)
    return torch.cat(found, 2)[:, :, :n] if found else q.new_zeros(*q.shape[:3], x.shape[-1])


def _kept(chunk: Tensor | float, state: Tensor) -> Tensor:
    return state if isinstance(chunk, float) else chunk[:, 0] * state


def _causal_backward(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    g: Tensor,
    weights: Tensor,
    decay: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq with the states of the keys before, then from the end dk and dx with those after."""
    n, m, d, degree = q.shape[2], k.shape[2], _Decay.of(decay, q), rule.degree
    empty = x.new_zeros(*q.shape[:2], len(weights), x.shape[-1])
    groups = list(_groups((q, k, x, g), n, weights, decay))
    state, dq, back, dk, dx = empty, [], empty, [], []
    for queries, keys, values, grads in groups:
        sums = features(keys, degree).mT @ (d.until * values)
        ahead = _before(sums, state) * weights[:, None]
        ds = rule.slope(queries @ keys.mT) * d.near * (grads @ values.mT)
        far = _pulled(queries, degree, (d.since * grads) @ ahead.mT)[1]
        dq.append((ds @ keys + far).flatten(2, 3))
        state = _kept(d.chunk, state) + sums.sum(2)
    for queries, keys, values, grads in reversed(groups):
        sums = features(queries, degree).mT @ (d.since * grads)
        later = _before(sums.flip(2), back).flip(2) * weights[:, None]
        scores = queries @ keys.mT
        ds = rule.slope(scores) * d.near * (grads @ values.mT)
        phi, far = _pulled(keys, degree, (d.until * values) @ later.mT)
        dk.append((ds.mT @ queries + far).flatten(2, 3))
        dx.append(((rule.f(scores) * d.near).mT @ grads + d.until * (phi @ later)).flatten(2, 3))
        back = _kept(d.chunk, back) + sums.sum(2)
    return torch.cat(dq, 2)[:, :, :n], _reached(dk, m), _reached(dx, m)


def _reached(parts: list[Tensor], m: int) -> Tensor:
    """Gradients of chunks from the last one on; keys past the last query get 0."""
    found = torch.cat(parts[::-1], 2)[:, :, :m]
    return F.pad(found, (0, 0, 0, m - found.shape[2]))
