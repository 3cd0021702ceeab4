"""Softmax attention as a form, and what it computes in plain ATen.

The mask by rule (causal, window, sinks, blocks) is part of the form; what comes as a tensor (a
bias, a value for each lag, keys that are padding) is an input of the operator. Scores exist for
some queries at a time, and only against keys that one of them may see: no matrix of all scores is
built.

>>> form = Softmax(scale=0.125, causal=True, window=256, sinks=4)
>>> str(form)
'softmax(0.125,1,0,256,4,0.0,0,0,0.0)'
>>> Softmax.parse(str(form)) == form
True
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from structc.errors import InternalError

ELEMENTS = 1 << 23
"""Scores that the reference holds at a time."""
LOWEST = -1e30
GONE, _GONE_SINGLE = 800.0, 130.0
"""A score that is lower by so much has a weight of exactly 0, in double and in single precision."""
_TEXT = re.compile(r"softmax\(([^()]*)\)")


@dataclass(frozen=True)
class Softmax:
    """``softmax(scale q k^T + bias, masked) v``, one row a query.

    Query i sees key j where all of these hold, with ``t = i + offset``:

    - ``causal``: ``j <= t``;
    - ``window`` w > 0: ``t - w < j``, and ``j < t + w`` unless causal; or ``j < sinks``;
    - ``block_q`` > 0: the operator's ``blocks`` allow block ``(i // block_q, j // block_k)``.

    Attributes:
        scale: factor on ``q k^T``.
        causal, offset, window, sinks: as above.
        softcap: c > 0 turns scores s into ``c tanh(s / c)`` before biases and masks.
        block_q, block_k: sizes of the blocks, 0 without.
        fill: what a hidden score is: 0 where it hides for sure, and a row that sees no key is 0;
            -inf where such a row is NaN; f < 0 where it is the number f, so that a row that sees
            no key is the mean of all values, and scores around f share a row with hidden ones.
    """

    scale: float
    causal: bool = False
    offset: int = 0
    window: int = 0
    sinks: int = 0
    softcap: float = 0.0
    block_q: int = 0
    block_k: int = 0
    fill: float = 0.0

    def __str__(self) -> str:
        values = (getattr(self, f.name) for f in fields(self))
        return f"softmax({','.join(str(int(v) if isinstance(v, bool) else v) for v in values)})"

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> Softmax:
        """The form that :meth:`__str__` wrote."""
        match = _TEXT.fullmatch(text)
        words = match[1].split(",") if match else []
        if len(words) != len(fields(Softmax)):
            raise InternalError(f"{text!r} is no softmax attention")
        try:
            scale, causal, offset, window, sinks, softcap, block_q, block_k, fill = words
            return Softmax(
                float(scale),
                bool(int(causal)),
                int(offset),
                int(window),
                int(sinks),
                float(softcap),
                int(block_q),
                int(block_k),
                float(fill),
            )
        except ValueError:
            raise InternalError(f"{text!r} is no softmax attention") from None

    def spans(self, first: int, last: int, keys: int) -> list[tuple[int, int]]:
        """Ranges of keys that some query in ``[first, last)`` may see by rule, apart from blocks.

        >>> Softmax(1.0, causal=True, window=4, sinks=2).spans(10, 12, 100)
        [(0, 2), (7, 12)]
        """
        low, high = 0, keys
        if self.causal:
            high = min(keys, max(0, last + self.offset))
        elif self.window:
            high = min(keys, max(0, last - 1 + self.offset + self.window))
        if self.window:
            low = min(max(0, first + self.offset - self.window + 1), keys)
        sunk = min(self.sinks, high if self.causal else keys) if self.window else 0
        if sunk >= low:
            return [(0, max(high, sunk))] if max(high, sunk) > 0 else []
        return [(a, b) for a, b in ((0, sunk), (low, high)) if a < b]

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Which keys (columns) queries (rows) see by rule, apart from blocks; None for all."""
        if not (self.causal or self.window):
            return None
        at, to = queries[:, None] + self.offset, keys[None]
        seen = torch.ones((), dtype=torch.bool, device=queries.device)
        if self.window:
            seen = to > at - self.window
            if not self.causal:
                seen = seen & (to < at + self.window)
            seen = seen | (to < self.sinks)
        return seen & (to <= at) if self.causal else seen


class Extras(NamedTuple):
    """What an attention takes beside q, k and v; each may be None.

    Attributes:
        bias: ``(B|1, H|1, n_q|1, n_k|1)``: added to scores, or boolean, True where a key is seen.
        lags: ``(H|1, n_q + n_k - 1)``: query i and key j get the value at ``i - j + n_k - 1``.
        keys: ``(B|1, n_k)`` boolean: which keys any query sees.
        blocks: ``(B|1, H|1, blocks of queries, blocks of keys)`` boolean.
        sink: ``(H,)``: one more score in each row, which meets no value.
    """

    bias: Tensor | None = None
    lags: Tensor | None = None
    keys: Tensor | None = None
    blocks: Tensor | None = None
    sink: Tensor | None = None


NOTHING = Extras()


def softmax_reference(
    q: Tensor, k: Tensor, v: Tensor, form: Softmax, extras: Extras
) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, n_q, d_v)`` and the natural logarithm of each row's sum ``(B, H, n_q)``.

    A query that sees no key gives 0 (or what ``form.fill`` says) and -inf: sums are of seen keys.
    What is hidden by ``keys`` may be NaN.
    """
    b, h = q.shape[:2]
    wide, given = _wide(q.dtype), v
    k, v = _seen_only(k, v, extras)
    k, v = (_grouped(t.to(wide), h) for t in (k, v))
    outputs = [q.new_zeros(b, h, 0, v.shape[-1], dtype=wide)]
    sums = [q.new_zeros(b, h, 0, dtype=wide)]
    for part in parts(q, k, form):
        scores, _ = part.scores(q.to(wide), k, form, extras)
        o, lse = _rows(scores, part.take(v), _sink(extras, wide))
        outputs.append(o)
        sums.append(lse)
    o, lse = torch.cat(outputs, 2), torch.cat(sums, 2)
    return laid_out(filled(o, lse, q, k, given, form, extras), q.dtype), lse


def faint_rows(lse: Tensor, form: Softmax, dtype: torch.dtype) -> Tensor:
    """Rows whose hidden scores count: their seen keys together are hardly above ``form.fill``."""
    return lse <= form.fill + (GONE if dtype == torch.float64 else _GONE_SINGLE)


def filled(
    o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, form: Softmax, extras: Extras
) -> Tensor:
    """The output with hidden scores at ``form.fill``, from that with hidden scores at -inf.

    They differ in faint rows alone, which are computed anew, each on its own: rows without keys,
    and where scores come near -1e9. Gradients pass.

    Cost:    a look at the row sums.
    """
    if not form.fill or not lse.numel():
        return o
    if torch.compiler.is_compiling():  # no values to look at: rows without keys alone
        other = torch.nan if form.fill == -torch.inf else _grouped(v, q.shape[1]).mean(2, True)
        return torch.where((lse == -torch.inf)[..., None], other, o)
    faint = faint_rows(lse, form, q.dtype)
    if not bool(faint.any()):
        return o
    if form.fill == -torch.inf:
        return o.masked_fill(faint[..., None], torch.nan)
    wide_v = _grouped(v.to(_wide(q.dtype)), q.shape[1])
    if by_rule(extras):  # nothing but the mask makes a score -inf
        dead = lse == -torch.inf
        o = torch.where(dead[..., None], wide_v.mean(2, keepdim=True).to(o.dtype), o)
        faint = faint & ~dead
    wide_q, wide_k = q.to(wide_v.dtype), _grouped(k.to(wide_v.dtype), q.shape[1])
    for i in faint.flatten(0, 1).any(0).nonzero().flatten().tolist():
        row = Part(i, i + 1, ((0, k.shape[2]),), q.device)
        scores, _, hidden = row.shown(wide_q, wide_k, form, extras)
        scores = scores if hidden is None else scores.masked_fill(hidden, form.fill)
        anew = (scores.softmax(-1) @ wide_v).to(o.dtype)
        o = torch.where(
            (faint & (torch.arange(o.shape[2], device=o.device) == i))[..., None], anew, o
        )
    return o


def by_rule(extras: Extras) -> bool:
    """Whether nothing is added to scores."""
    bias = extras.bias
    return extras.lags is None and (bias is None or bias.dtype == torch.bool)


def laid_out(o: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads side by side in memory, as what follows an attention wants them."""
    return o.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


@dataclass(frozen=True)
class Part:
    """Queries ``[first, last)`` and the ranges of keys that one of them may see by rule."""

    first: int
    last: int
    spans: tuple[tuple[int, int], ...]
    device: torch.device

    def take(self, of_keys: Tensor, dim: int = -2) -> Tensor:
        """The entries of those keys."""
        pieces = [of_keys.narrow(dim, a, b - a) for a, b in self.spans]
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces, dim) if pieces else of_keys.narrow(dim, 0, 0)

    def keys(self) -> Tensor:
        """Their numbers."""
        pieces = [torch.arange(a, b, device=self.device) for a, b in self.spans]
        return torch.cat([torch.arange(0, device=self.device), *pieces])

    def scores(self, q: Tensor, k: Tensor, form: Softmax, extras: Extras) -> tuple[Tensor, Tensor]:
        """Masked scores of these queries against these keys, and those before the cap."""
        s, raw, hidden = self.shown(q, k, form, extras)
        return (s if hidden is None else s.masked_fill(hidden, -torch.inf)), raw

    def shown(
        self, q: Tensor, k: Tensor, form: Softmax, extras: Extras
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores, those before the cap, and which of them are hidden."""
        raw = form.scale * (q[:, :, self.first : self.last] @ self.take(k).mT)
        s = form.softcap * torch.tanh(raw / form.softcap) if form.softcap else raw
        queries = torch.arange(self.first, self.last, device=self.device)
        keys, total = self.keys(), k.shape[-2]
        if extras.lags is not None:
            s = s + extras.lags.to(s.dtype)[:, queries[:, None] - keys[None] + total - 1]
        hidden = None
        if extras.bias is not None:
            rows = extras.bias if extras.bias.shape[-2] == 1 else extras.bias[:, :, queries]
            some = rows if rows.shape[-1] == 1 else self.take(rows, -1)
            if some.dtype == torch.bool:
                hidden = ~some
            else:
                s = s + some.to(s.dtype)
        for seen in (
            form.visible(queries, keys),
            None if extras.keys is None else self.take(extras.keys, -1)[:, None, None],
            None if extras.blocks is None else _of_blocks(extras.blocks, form, queries, keys),
        ):
            if seen is not None:
                hidden = ~seen if hidden is None else hidden | ~seen
        return s, raw, hidden


def parts(q: Tensor, k: Tensor, form: Softmax) -> Iterator[Part]:
    """The queries, so many at a time that their scores stay below :data:`ELEMENTS`."""
    b, h, n, _ = q.shape
    total = k.shape[-2]
    reach = min(total, form.window + 512) if form.window else total
    step = min(512, max(16, ELEMENTS // max(1, b * h * reach)))
    for first in range(0, n, step):
        last = min(n, first + step)
        yield Part(first, last, tuple(form.spans(first, last, total)), q.device)


def softmax_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Softmax,
    extras: Extras,
    o: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the row sums, in the memory of some queries' scores.

    With ``P = exp(S - lse)`` and ``D_i = <dO_i, O_i> - dlse_i``: ``dV = P^T dO``,
    ``dS = P * (dO V^T - D)``, ``dQ = scale dS K``, ``dK = scale dS^T Q``
    (FlashAttention, Dao et al. 2022, appendix B).
    """
    h = q.shape[1]
    wide, heads = _wide(q.dtype), k.shape[1]
    k, v = _seen_only(k, v, extras)
    wide_q, wide_k, wide_v = q.to(wide), _grouped(k.to(wide), h), _grouped(v.to(wide), h)
    grad, dot = grad_o.to(wide), (grad_o.to(wide) * o.to(wide)).sum(-1) - grad_lse.to(wide)
    dq, dk, dv = (torch.zeros_like(t) for t in (wide_q, wide_k, wide_v))
    safe = lse.to(wide).masked_fill(lse == -torch.inf, torch.inf)
    for part in parts(q, k, form):
        rows = slice(part.first, part.last)
        scores, raw = part.scores(wide_q, wide_k, form, extras)
        p = (scores - safe[:, :, rows, None]).exp_()
        faint = lse[:, :, rows, None] < LOWEST  # there the logarithm of the sum is lost
        watched = torch._C._len_torch_dispatch_stack() > 0  # a tracer has no values to look at
        if watched or bool((faint & (safe[:, :, rows, None] < 0)).any()):
            p = torch.where(faint, scores.softmax(-1).nan_to_num(0.0), p)
        some_v = part.take(wide_v)
        ds = p * (grad[:, :, rows] @ some_v.mT - dot[:, :, rows, None])
        if form.softcap:
            ds = ds * (1 - torch.tanh(raw / form.softcap) ** 2)
        dq[:, :, rows] = form.scale * (ds @ part.take(wide_k))
        to_k, to_v = form.scale * (ds.mT @ wide_q[:, :, rows]), p.mT @ grad[:, :, rows]
        at = 0
        for low, high in part.spans:
            dk[:, :, low:high] += to_k[:, :, at : at + high - low]
            dv[:, :, low:high] += to_v[:, :, at : at + high - low]
            at += high - low
    if -torch.inf < form.fill < 0:  # rows without keys are means
        dead = (lse == -torch.inf)[..., None]
        dv += (grad * dead).sum(2, keepdim=True) / max(1, k.shape[2])
    shared = [t.unflatten(1, (heads, h // max(1, heads))).sum(2) for t in (dk, dv)]
    return dq.to(q.dtype), shared[0].to(q.dtype), shared[1].to(q.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sink(extras: Extras, wide: torch.dtype) -> Tensor | None:
    return None if extras.sink is None else extras.sink.to(wide)


def _seen_only(k: Tensor, v: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
    if extras.keys is None:
        return k, v
    hidden = ~extras.keys[:, None, :, None]
    return k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)


def _grouped(t: Tensor, heads: int) -> Tensor:
    """One head for each query head: heads of keys repeat within their group."""
    if t.shape[1] == heads:
        return t
    return t.repeat_interleave(heads // max(1, t.shape[1]), 1)


def _of_blocks(blocks: Tensor, form: Softmax, queries: Tensor, keys: Tensor) -> Tensor:
    rows = blocks[:, :, queries // form.block_q]
    return rows[..., keys // form.block_k]


def _rows(scores: Tensor, v: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax of scores times v, and the logarithm of its sums."""
    if not scores.shape[-1]:  # no key at all
        top = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    else:
        top = scores.detach().amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink.detach()[:, None, None])
    shift = top.masked_fill(top == -torch.inf, 0)
    e = (scores - shift).exp()
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink[:, None, None] - shift).exp()
    # not through the logarithm of the sum: beside the lowest number that is lost
    none = total == 0
    safe = total.masked_fill(none, 1)
    p = e / safe
    lse = (shift + safe.log()).masked_fill(none, -torch.inf)
    finite = v.isfinite().all(-1)
    o = p @ v.masked_fill(~finite[..., None], 0)
    if not torch.compiler.is_compiling() and not bool(finite.all()):  # 0 * NaN is NaN
        for at in (~finite).reshape(-1, finite.shape[-1]).any(0).nonzero().flatten().tolist():
            reached = (scores[..., at, None] > -torch.inf) & ~finite[:, :, None, at, None]
            o = o + torch.where(reached, p[..., at, None] * v[:, :, at : at + 1], 0)
    return o, lse.squeeze(-1)
