"""Learned butterflies: factors and permutations found by gradient, the last resort of fitting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, with_epilogue
from structc.families.fits import analytic, simulated
from structc.families.relaxed import RelaxedButterfly, strides
from structc.forms import Block, Repeat, Select, Step, Tile
from structc.numerics import relative_error
from structc.records import Hyper, Refusal

LAYOUTS = ("bp", "kaleidoscope")
LARGEST = 128
"""Features up to which a fit is tried: gradients of the whole matrix, thousands of times."""
RESTARTS, BATCHES, STEPS = 12, 3, 1500
"""Starts that are trained side by side, how often that is repeated, Adam steps of each."""
SOLVED = 3e-2
"""Relative error from which rounding the permutations and a polish finish a start."""
POLISH = 200
"""Steps of L-BFGS."""


@final
class LearnedButterfly(AbstractStructured):
    """Levels of 2 x 2 blocks with permutations between: (B P)^w, or Kaleidoscope's (B B*)^w.

    Math:    bp: M = B_w P_w ... B_1 P_1, B = F_N ... F_4 F_2, where F_2t has a 2 x 2 block for each
             pair of features t apart; kaleidoscope: M = (B'_w B_w) ... (B'_1 B_1), B' with its
             levels in the other order.
    Shapes:  x (..., n), n a power of two;  levels (n / 2t, 2, 2, t), tied (2, 2, t);  for bp
             order0, order1, ... (n,) of int64;  y (..., n).
    Cost:    flops = 4*rows*n*log2(n) a B;  params = 2*n*log2(n) a B, tied 4*(n - 1).
    Errors:  none; other sizes than powers of two, and above 128, are Refusals of fit.
    Source:  Dao et al. 2019, arXiv:1903.05895 (relaxed permutations: three generators a level, so 8
             choices); Dao et al. 2020, Kaleidoscope, arXiv:2012.14966.

    >>> m = LearnedButterfly.learn(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    >>> round(m.error(torch.tensor([[1.0, 1.0], [1.0, -1.0]])), 4)
    0.0
    """

    name: ClassVar[str] = "learned_butterfly"
    finds_members: ClassVar[bool] = False

    def __init__(self, levels: Sequence[Tensor], orders: Sequence[Tensor], depth: int) -> None:
        first = levels[0]
        n = 2 * first.shape[-1] * (first.shape[0] if first.dim() == 4 else 1)
        if first.dim() == 3:
            n = 2 ** (len(levels) // depth // (1 if orders else 2))
        super().__init__(n, n)
        self.depth, self.tied = depth, int(first.dim() == 3)
        self.layout = "bp" if orders else "kaleidoscope"
        self.levels = nn.ParameterList(levels)
        for at, order in enumerate(orders):
            self.register_buffer(f"order{at}", order)

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        n, step = in_features, Repeat if hyper["tied"] else Block
        up = [step(n // (2 * t), 2, 2, t) for t in strides(n)]
        one: list[Step] = [*up, *reversed(up)]
        if hyper["layout"] == "bp":
            one = [Select(n, n), *up]
        program = Tile(tuple(one * hyper["depth"]))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        n, depth = in_features, hyper["depth"]
        shapes = [(2, 2, t) if hyper["tied"] else (n // (2 * t), 2, 2, t) for t in strides(n)]
        mirrored = hyper["layout"] == "kaleidoscope"
        one = [*shapes, *reversed(shapes)] if mirrored else shapes
        orders = [] if mirrored else [torch.arange(n) for _ in range(depth)]
        return cls([torch.empty(s, dtype=dtype) for s in one * depth], orders, depth)

    @classmethod
    @analytic
    def fit(
        cls,
        weight: Tensor,
        gram: Tensor | None = None,
        *,
        layout: str,
        depth: int,
        tied: int,
    ) -> Self | Refusal:
        """Adam on relaxed permutations from several starts, rounding, L-BFGS; a local optimum.

        Args:
            weight: ``(n, n)``, n a power of two up to 128, which takes minutes; fitted in float64.
            gram: ``E[x x^T]``, ``(n, n)``; refines what is found without it.
            layout: "bp" or "kaleidoscope".
            depth: w, how often that is repeated.
            tied: 1 for one block a level.
        """
        m, n = weight.shape
        if m != n or n < 2 or n & (n - 1) or n > LARGEST:
            reason = f"{m} x {n} is no square of a power of two from 2 to {LARGEST}"
            return Refusal("", cls.name, "SIZE", reason)
        if layout not in LAYOUTS or depth < 1 or tied not in (0, 1):
            return Refusal("", cls.name, "LAYOUT", f"no butterfly is {layout!r} {depth} {tied}")
        found = cls.learn(weight, layout=layout, depth=depth, tied=tied)
        return found if gram is None else cls._of(found._relaxed().polished(weight, gram, POLISH))

    @classmethod
    def learn(
        cls, target: Tensor, *, layout: str = "bp", depth: int = 1, tied: int = 0, seed: int = 0
    ) -> Self:
        """The best of several trained starts, for a real or a complex target.

        Complex targets get complex factors. Stops at the first batch of starts of which one can be
        finished by a polish.

        Args:
            target: ``(n, n)``, n a power of two.
            layout, depth, tied: as in :meth:`fit`.
            seed: of the starts.
        """
        n = len(target)
        wide = target.to(torch.complex128 if target.is_complex() else torch.float64)
        best: RelaxedButterfly | None = None
        error = math.inf
        for batch in range(BATCHES):
            starts = RelaxedButterfly(
                n,
                layout=layout,
                depth=depth,
                tied=bool(tied),
                dtype=wide.dtype,
                starts=RESTARTS,
                seed=seed * BATCHES + batch,
            )
            tried = starts.trained(wide, STEPS).polished(wide, None, POLISH)
            now = relative_error(tried.matrix()[0], wide)
            if now < error:
                best, error = tried, now
            if error < SOLVED:
                break
        assert best is not None
        return cls._of(best)

    @classmethod
    def _of(cls, relaxed: RelaxedButterfly) -> Self:
        levels, orders = relaxed.factors()
        return cls(levels, orders, relaxed.depth)

    def _relaxed(self) -> RelaxedButterfly:
        orders = [b for name, b in self.named_buffers() if name.startswith("order")]
        return RelaxedButterfly.of(list(self.levels), orders, self.in_features, self.depth)

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        return simulated(cls, min(in_features, 64), min(in_features, 64), hyper)

    def hyper(self) -> Hyper:
        return {"layout": self.layout, "depth": self.depth, "tied": self.tied}

    def factors(self) -> list[Tensor]:
        if self.layout == "kaleidoscope":
            return list(self.levels)
        each = len(self.levels) // self.depth
        found: list[Tensor] = []
        for at in range(self.depth):
            found.append(getattr(self, f"order{at}"))
            found += list(self.levels)[at * each : (at + 1) * each]
        return found

    def to_dense(self) -> Tensor:
        return self._relaxed().matrix()[0]
