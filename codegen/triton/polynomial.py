"""Polynomial attention and its gradient on Triton kernels, the state a chunk at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from structc.attention.feature_sums import Rule, monomials, weights_of
from structc.codegen.triton import method_kernel
from structc.codegen.triton.config import Config
from structc.codegen.triton.entry import Entry
from structc.codegen.triton.method_kernel import MethodKernel, serves, side, wide
from structc.codegen.triton.polynomial_source import LENGTHS, POINTERS, SOURCE, STRIDES

WIDEST = 128
"""Numbers of a head."""
CHUNK = 128
"""Tokens of a chunk at least; tiles divide it."""
CONFIGS = (
    Config(64, 64, 64, 4, 2), Config(64, 64, 32, 4, 2), Config(64, 32, 32, 4, 2),
    Config(32, 64, 32, 4, 2), Config(32, 32, 32, 4, 2), Config(32, 32, 32, 4, 1),
    Config(32, 32, 16, 8, 1), Config(16, 32, 32, 4, 1), Config(16, 32, 16, 8, 1),
    Config(32, 16, 16, 8, 1), Config(16, 16, 16, 8, 1), Config(16, 16, 16, 4, 1),
    Config(32, 32, 16, 8, 2), Config(32, 16, 16, 8, 2), Config(16, 16, 16, 4, 2),
)  # fmt: skip
"""Queries, keys and monomials of a tile, warps, stages."""


def _kernel(name: str, tiles: tuple[str, ...] = ("BM", "BN", "BK")) -> MethodKernel:
    return MethodKernel(
        f"polynomial_{name}", SOURCE, CONFIGS, tiles, POINTERS[name], STRIDES[name], LENGTHS[name],
        single=True,
    )  # fmt: skip


STATES = _kernel("states", ("BN", "BK"))
WHOLE_STATES = replace(STATES, pointers={**POINTERS["states"], "state": "fp32"})
"""For differences of states."""
OUTPUTS, QUERIES, KEYS = map(_kernel, ("outputs", "queries", "keys"))
KERNELS = (STATES, OUTPUTS, QUERIES, KEYS)


class Given(NamedTuple):
    """What all kernels of a call share.

    Attributes:
        places: ``(degree, count)``, the feature of each factor of a monomial; d where it has none.
        weights: of each monomial.
        f: coefficients, the constant first.
        slopes: of each head, how a pair's weight falls by lag; any tensor without.
        causal, decay: what there is.
        chunk: tokens.
        short: whether neither queries nor keys fill more than one.
    """

    places: Tensor
    weights: Tensor
    f: Tensor
    slopes: Tensor
    causal: bool
    decay: bool
    chunk: int
    short: bool

    @property
    def many(self) -> int:
        """Monomials."""
        return len(self.weights)

    @property
    def tables(self) -> list[Tensor]:
        """As kernels take them."""
        return [self.places, self.weights, self.slopes, self.f]


@dataclass(frozen=True, eq=False)
class PolynomialKernel:
    """``(q, k, v, rule, decay) -> (o, z)``, z what rows were divided by; or None.

    Memory: states of each chunk, ``n / chunk`` of ``D e`` numbers a head in q's dtype (float32 for
    float16); a chunk is a quarter of the D monomials, so that is about ``4 n e``, four times v.
    Where there is no such room the answer is None.
    """

    def serves(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether there are kernels for these, in v's dtype."""
        return serves(WIDEST, q, k, v)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, rule: Rule, decay: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        given = given_of(q, k, rule, decay)
        o = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        z = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        q, k, v = map(side, (q, k, v))
        before = _needed(k, v, given)
        if before is None:
            return None
        done = _run(OUTPUTS, [q, k, v, *given.tables, *before, o, z], (q, k, v), given)
        return (o, z) if done else None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rule: Rule,
        decay: Tensor | None,
        o: Tensor,
        z: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Gradients of q, k and v, or None where they are not served."""
        given = given_of(q, k, rule, decay)
        dots = (grad.float() * o.float()).sum(-1)
        q, k, v, grad = map(side, (q, k, v, grad.to(q.dtype)))
        found = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
        before, behind = _needed(k, v, given), _needed(q, grad, given, (z, dots))
        if before is None or behind is None:
            return None
        inputs = [q, k, v, grad, z, dots, *given.tables]
        for kernel, sums, out in ((QUERIES, before, found[:1]), (KEYS, behind, found[1:])):
            if not _run(kernel, [*inputs, *sums, *out], (q, k, v, grad), given):
                return None
        return found[0], found[1], found[2]


def chunk_of(count: int, length: int, causal: bool) -> int:
    """Tokens of a chunk: about a quarter of the monomials, so that its own keys, met as scores,
    take no longer than the state; all where none is hidden.

    >>> chunk_of(2145, 4096, True), chunk_of(153, 4096, True), chunk_of(153, 4096, False)
    (640, 128, 4096)
    """
    whole = -(-length // CHUNK) * CHUNK
    return min(whole, max(CHUNK, -(-count // 4 // CHUNK) * CHUNK)) if causal else whole


def given_of(q: Tensor, k: Tensor, rule: Rule, decay: Tensor | None) -> Given:
    """What kernels of a call are given beside tokens."""
    places, weights, f = _tables(rule.a, q.shape[-1], q.device)
    slopes = weights if decay is None else decay.to(q.device, torch.float32).contiguous()
    length = max(q.shape[2], k.shape[2])
    chunk = chunk_of(len(weights), length, rule.causal)
    return Given(places, weights, f, slopes, rule.causal, decay is not None, chunk, length <= chunk)


@functools.lru_cache(maxsize=32)
def _tables(a: tuple[float, ...], d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Places, weights and coefficients, made once for each device."""
    degree = len(a) - 1
    rows = [(*c, *[d] * (degree - len(c))) for c in monomials(d, degree)[0]]
    places = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), degree).T.contiguous()
    single = (weights_of(a, d).float(), torch.tensor(a, dtype=torch.float32))
    return places.to(device), single[0].to(device), single[1].to(device)


def _needed(
    x: Tensor, y: Tensor, given: Given, back: tuple[Tensor, Tensor] | None = None
) -> list[Tensor] | None:
    """The states of a call; none where all tokens are one chunk: nothing stands before it."""
    if given.causal and given.short:
        kept = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        return [given.weights.view(kept), given.weights]  # nothing reads them
    return states(STATES, x, y, given, back)


def states(
    kernel: MethodKernel,
    x: Tensor,
    y: Tensor,
    given: Given,
    back: tuple[Tensor, Tensor] | None = None,
    *,
    skip: int = 0,
) -> list[Tensor] | None:
    """Sums of monomials of x times y before each chunk, and those times 1.

    Args:
        kernel: ``STATES``, or ``WHOLE_STATES`` for sums in float32.
        back: z and dots: what stands behind each chunk instead, of ``y / z`` and ``-dots / z``.
        skip: first tokens that are left out.
    """
    b, h, n, e = y.shape
    chunks, count = -(-n // given.chunk), given.many
    half = kernel is STATES and x.dtype == torch.bfloat16
    kept = torch.bfloat16 if half else torch.float32
    try:
        state = torch.empty(b, h, chunks + 1, count, e, dtype=kept, device=x.device)
        mass = torch.empty(b, h, chunks + 1, count, dtype=torch.float32, device=x.device)
    except torch.OutOfMemoryError:  # the scan holds one state
        return None
    done = kernel.run(
        [x, y, *(back or (mass, mass)), given.places, given.slopes, state, mass], [x, y],
        [h, n, skip, given.chunk, chunks, count, x.shape[3], e],
        lambda c: b * h * -(-count // c.bk), x,
        DEGREE=len(given.places), BACK=back is not None, DECAY=given.decay, WIDE=wide(e),
    )  # fmt: skip
    return [state, mass] if done else None


def _run(
    kernel: MethodKernel, tensors: list[Tensor], inputs: Sequence[Tensor], given: Given
) -> bool:
    """Launch a kernel of queries or keys."""
    (b, h, n, d), m, e = inputs[0].shape, inputs[1].shape[2], inputs[2].shape[3]
    summed, length, tile = (n, m, "bn") if kernel is KEYS else (m, n, "bm")
    return kernel.run(
        tensors, inputs, [h, n, m, given.chunk, -(-summed // given.chunk), given.many, d, e],
        lambda c: b * h * -(-length // getattr(c, tile)), inputs[0],
        DEGREE=len(given.places), CAUSAL=given.causal, DECAY=given.decay, WD=wide(d), WIDE=wide(e),
    )  # fmt: skip


CASES = {
    "polynomial 2, causal, heads of 64": (Rule((1.0, 1.0, 0.5), causal=True), 64),
    "polynomial 2 of 16, values of 64": (Rule((1.0, 1.0, 0.5)), 16),
}
"""What ``structc bench triton`` compiles: the polynomial, and numbers of a key."""


def entries(dtype: torch.dtype, targets: Sequence[str], every: bool) -> list[Entry]:
    """For ``structc bench triton``: outputs and gradients."""
    found = []
    for name, (rule, d) in CASES.items():
        q, k = torch.empty(2, 1, 8, 4096, d, dtype=dtype, device="meta").unbind(0)
        v = torch.empty(1, 8, 4096, 64, dtype=dtype, device="meta")
        found += method_kernel.entries(
            name, functools.partial(_both, q, k, v, rule), targets, every
        )
    return found


def _both(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> None:
    kernel = PolynomialKernel()
    done = kernel(q, k, v, rule, None)
    assert done is not None
    kernel.backward(q, k, v, rule, None, *done, torch.empty_like(v))
