"""What every attention method is: mathematics on q, k and v, with its cost and its error."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structc.attention.exact import check_qkv, exact
from structc.attention.stats import HeadStats
from structc.records import Refusal

WEIGHTS = 1 << 27
"""Weights of an uncertified method that are computed to hold them against exact ones."""


@dataclass(frozen=True, kw_only=True)
class AbstractMethod(abc.ABC):
    """A way to compute, or to approximate, ``softmax(scale q k^T) v``.

    A method is frozen data: two that are equal compute the same. It is called on
    ``(batch, heads, length, head_dim)`` tensors and works alone, without a compiled model.

    Laws (the contract suite checks them for every line of ``METHODS``):
        ``method(q, k, v) == method.matrix(q, k) @ v`` up to rounding;
        rows of ``matrix`` sum to 1, and with ``is_causal`` nothing is above its diagonal;
        gradients are those of ``matrix(q, k) @ v``;
        no intermediate has ``n_q n_k`` elements;
        where ``certified``, the second value of ``attend`` is ``<p, s> + H(p)`` of each row, so
        that ``lse_true - lse`` is the row's Kullback-Leibler divergence from exact attention.

    Attributes:
        scale: factor on ``q k^T``, ``1 / sqrt(d)`` if None.
    """

    name: ClassVar[str]
    certified: ClassVar[bool] = False
    """Whether ``attend`` gives the row sums that an error certificate needs."""

    scale: float | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output ``(B, H, n_q, d_v)``; zeros without keys, as exact attention gives."""
        if 0 in (*q.shape[:3], k.shape[2]):
            return exact(q, k, v, scale=self.scale)
        if q.is_cpu:
            return self.attend(q, k, v)[0]
        with q.device:  # what a method makes lies where q does
            return self.attend(q, k, v)[0]

    @abc.abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output, and the row sums of :attr:`certified` methods ``(B, H, n_q)``."""

    def matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """The attention matrix ``(B, H, n_q, n_k)`` that the method stands for; for tests."""
        sizes = (*q.shape[:3], k.shape[2])
        return self._matrix(q, k) if 0 not in sizes else q.new_zeros(sizes)

    @abc.abstractmethod
    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """:meth:`matrix` of at least one query and key."""

    @abc.abstractmethod
    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """Of one head."""

    def applies(self, queries: int, keys: int) -> Refusal | None:
        """Why it cannot be used for these lengths, or None."""
        return None

    @classmethod
    def proposals(cls, stats: HeadStats) -> tuple[AbstractMethod, ...] | Refusal:
        """What might compute a head with these statistics, or the number that speaks against it.

        A method that is not for trained softmax attention proposes nothing by itself.
        """
        return Refusal("", cls.name, "ASKED_ONLY", "used where it is asked for by name alone")

    def holds(self, q: Tensor, k: Tensor) -> bool:
        """Whether an input is inside what the method's error was measured for; checked each call"""
        return True

    def sigma(self, q: Tensor) -> float:
        """The factor on ``q k^T``."""
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def refuse(self, code: str, reason: str) -> Refusal:
        """A refusal of this method."""
        return Refusal("", self.name, code, reason)


@dataclass(frozen=True, eq=False)
class Judgement:
    """A method against exact attention on some queries, head by head.

    Attributes:
        rows: queries that were looked at.
        kl, tv: divergence and total variation ``(B, H, rows)``; NaN where weights are no
            distribution, or too many to compute.
        gap, size: squared norms of the error and of the output ``(B, H)``.
        bound: mean of ``TV diam(V)`` ``(B, H)``.
    """

    rows: int
    kl: Tensor
    tv: Tensor
    gap: Tensor
    size: Tensor
    bound: Tensor


@dataclass(frozen=True)
class Certificate:
    """How far a method is from exact attention on some queries.

    Attributes:
        rows: queries that were looked at; the numbers speak of them alone.
        kl, worst_kl: Kullback-Leibler divergence of the method's rows from exact ones, mean and
            largest, in nats; NaN where the method's weights are no distribution.
        tv, worst_tv: total variation ``sum |p - a| / 2``, mean and largest.
        error: relative output error of these rows.
        bound: mean of ``TV * diam(V)`` over the rows: what an output row may be off by.
    """

    rows: int
    kl: float
    worst_kl: float
    tv: float
    worst_tv: float
    error: float
    bound: float


def certify(
    method: AbstractMethod, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, rows: int = 64
) -> Certificate:
    """Hold a method against exact attention on sampled queries.

    For a certified method the divergence of a row is ``lse_true - lse`` exactly; its total
    variation is bounded by ``min(sqrt(KL / 2), sqrt(1 - exp(-KL)))`` (Pinsker; Bretagnolle and
    Huber 1979). For the others weights are computed in full on the sampled rows.

    Args:
        method: to be judged.
        q, k, v: ``(B, H, n, d)``, calibration data.
        is_causal: whether exact attention is.
        rows: how many queries, spread evenly, the last one among them.

    Cost:    ``rows`` rows of exact attention and one call of the method.
    Source:  the variational form of the log-partition function; Wainwright and Jordan 2008, 3.4.

    >>> from structc.attention import Uniform
    >>> q, k, v = torch.zeros(3, 1, 2, 50, 8).unbind(0)
    >>> certify(Uniform(), q, k, v + 1, is_causal=False).worst_kl < 1e-6
    True
    """
    found = judged(method, q, k, v, is_causal=is_causal, rows=rows)
    return Certificate(
        found.rows,
        float(found.kl.mean()),
        float(found.kl.max()),
        float(found.tv.mean()),
        float(found.tv.max()),
        float((found.gap.sum() / found.size.sum().clamp(min=1e-300)).sqrt()),
        float(found.bound.mean()),
    )


def judged(
    method: AbstractMethod, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, rows: int = 64
) -> Judgement:
    """What :func:`certify` says, of each head. Where the weights of an uncertified method would be
    more than :data:`WEIGHTS`, only its error is known."""
    n, m = q.shape[2], k.shape[2]
    at = torch.linspace(n - 1, 0, min(rows, n)).round().long().unique()
    got, lse = method.attend(q, k, v)
    wide_k, wide_v = k.double(), v.double()
    scores = method.sigma(q) * (q[:, :, at].double() @ wide_k.mT)
    if is_causal:
        scores = scores.masked_fill(torch.arange(m) > at[:, None], -math.inf)
    true_lse = scores.logsumexp(-1)
    true = (scores - true_lse[..., None]).exp()
    want = true @ wide_v
    if method.certified and lse is not None:
        kl = (true_lse - lse[:, :, at].double()).clamp(min=0)
        tv = torch.minimum((kl / 2).sqrt(), (1 - (-kl).exp()).sqrt())
    elif q.shape[0] * q.shape[1] * n * m > WEIGHTS:
        kl = tv = torch.full(true_lse.shape, math.nan)
    else:
        weights = method.matrix(q, k)[:, :, at].double()
        tv = (weights - true).abs().sum(-1) / 2
        logs = torch.where(weights > 0, weights.log() - true.log(), 0.0)
        kl = (
            (weights * logs).sum(-1)
            if bool((weights >= 0).all())
            else torch.full_like(tv, math.nan)
        )
    gap = (got[:, :, at].double() - want).square().sum((2, 3))
    spread = (wide_v.amax(2) - wide_v.amin(2)).norm(dim=-1)  # at least the diameter
    bound = (tv * spread[..., None]).mean(2)
    return Judgement(at.numel(), kl, tv, gap, want.square().sum((2, 3)), bound)


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions over disjoint keys as one: outputs and row sums.

    ``o = (e^{l1} o1 + e^{l2} o2) / (e^{l1} + e^{l2})``, ``l = log(e^{l1} + e^{l2})``; associative
    and commutative, and a row that sees no key on one side is the other's.

    >>> q, k, v = torch.randn(3, 1, 1, 30, 8).unbind(0)
    >>> a, b = (exact(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(9), slice(9, 30)))
    >>> torch.allclose(merge(*a, *b)[0], exact(q, k, v), atol=1e-5)
    True
    """
    top = torch.maximum(lse1, lse2)
    top = top.masked_fill(top == -math.inf, 0)
    a, b = (lse1 - top).exp(), (lse2 - top).exp()
    total = (a + b).masked_fill(a + b == 0, 1)
    o = (a / total)[..., None] * o1 + (b / total)[..., None] * o2
    return o.to(o1.dtype), torch.logaddexp(lse1, lse2)


def causal_mask(n: int, m: int, device: torch.device | None = None) -> Tensor:
    """True where query i sees key ``j <= i``; on the current device, or another."""
    return torch.arange(m, device=device)[None] <= torch.arange(n, device=device)[:, None]


__all__ = ["AbstractMethod", "Certificate", "causal_mask", "certify", "check_qkv", "exact", "merge"]
