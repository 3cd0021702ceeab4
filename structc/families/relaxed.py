"""Butterflies whose permutations are still mixtures: what gradients can train."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

FACTOR_RATE, CHOICE_RATE = 0.02, 0.05
"""Learning rates of Adam, for factors and for the logits of permutations."""
SHARP = 3.0
"""Logits are multiplied by it, so that choices are made early."""


def strides(n: int) -> list[int]:
    """How far apart the two features of a block are, level by level.

    >>> strides(8)
    [1, 2, 4]
    """
    return [1 << level for level in range(max(1, n.bit_length() - 1))]


class RelaxedButterfly(nn.Module):
    """(B P)^w or (B B*)^w with relaxed permutations, several starts side by side.

    Math:    at chunks of s = n, n / 2, ..., 4 features a permutation is, with p = sigmoid(3
             logits), x <- (1 - p0) x + p0 evens-then-odds(x), then the first half h <- (1 - p1) h
             + p1 reversed(h), the second half with p2: 8 choices a level once p is rounded; all
             p0 = 1 is bit reversal.
    Shapes:  x (..., n);  y (..., n) of the first start; levels (starts, n / 2t, 2, 2, t), tied
             (starts, 1, 2, 2, t); logits (starts, w, log2(n) - 1, 3).
    Source:  Dao et al. 2019, arXiv:1903.05895.

    Args:
        n: a power of two.
        layout: "bp" or "kaleidoscope", which has no permutations.
        depth: w.
        tied: one block a level.
        dtype: of the factors; complex ones are trained as pairs of real numbers.
        starts: how many are trained side by side.
        seed: of the random starts.

    >>> layer = RelaxedButterfly(8)
    >>> layer(torch.randn(3, 8)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        n: int,
        *,
        layout: str = "bp",
        depth: int = 1,
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
        starts: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.n, self.layout, self.depth, self.tied = n, layout, depth, tied
        g = torch.Generator().manual_seed(seed)
        ways = strides(n)
        one = [*ways, *reversed(ways)] if layout == "kaleidoscope" else ways
        self.steps = one * depth

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        def level(t: int) -> Tensor:
            shape = starts, 1 if tied else n // (2 * t), 2, 2, t
            if dtype.is_complex:
                return torch.complex(0.5 * noise(*shape), 0.5 * noise(*shape)).to(dtype)
            return (0.7 * noise(*shape)).to(dtype)

        self.levels = nn.ParameterList([level(t) for t in self.steps])
        real = torch.zeros((), dtype=dtype).real.dtype if dtype.is_complex else dtype
        logits = 0.3 * noise(starts, depth, max(0, len(ways) - 1), 3)
        self.logits = nn.Parameter(logits.to(real))
        self.hard: list[Tensor] | None = None
        """The rounded permutations, once they are; those of one start."""

    @classmethod
    def of(cls, levels: Sequence[Tensor], orders: Sequence[Tensor], n: int, depth: int) -> Self:
        """One start with factors and permutations that are known, sharing them."""
        tied = levels[0].dim() == 3
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.n, made.depth, made.tied = n, depth, tied
        made.layout = "bp" if orders else "kaleidoscope"
        ways = strides(n)
        made.steps = (ways if orders else [*ways, *reversed(ways)]) * depth
        made.__dict__["levels"] = [(w[None, None] if tied else w[None]) for w in levels]
        made.hard = list(orders)
        return made

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix()[0].mT

    def matrix(self) -> Tensor:
        """The matrices of all starts, ``(starts, n, n)``."""
        first = self.levels[0]
        starts, n = first.shape[0], self.n
        x = torch.eye(n, dtype=first.dtype, device=first.device).expand(starts, n, n)
        each = len(self.steps) // self.depth
        for turn in range(self.depth):
            if self.layout == "bp":
                x = self._permuted(x, turn)
            for at in range(turn * each, (turn + 1) * each):
                x = self._blocks(x, self.levels[at], self.steps[at])
        return x

    def _blocks(self, x: Tensor, w: Tensor, t: int) -> Tensor:
        starts, n = x.shape[0], self.n
        y = x.reshape(starts, n // (2 * t), 1, 2, t, n)
        return (w[..., None] * y).sum(3).reshape(starts, n, n)

    def _permuted(self, x: Tensor, turn: int) -> Tensor:
        if self.hard is not None:
            return x[:, self.hard[turn]]
        return _relaxed(x, torch.sigmoid(SHARP * self.logits[:, turn]))

    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Levels and permutations of one start, the scale shared evenly between the levels."""
        assert self.hard is not None and len(self.levels[0]) == 1
        levels = [w.detach()[0, 0] if self.tied else w.detach()[0] for w in self.levels]
        norms = [float(w.norm()) for w in levels]
        mean = math.exp(sum(math.log(v) for v in norms) / len(norms)) if min(norms) > 0 else 0.0
        even = [w * (mean / v if v > 0 else 0.0) for w, v in zip(levels, norms, strict=True)]
        return even, list(self.hard) if self.layout == "bp" else []

    # ------------------------------------------------------------------------ training

    def trained(self, target: Tensor, steps: int) -> Self:
        """Adam on factors and logits of all starts at once."""
        size = target.norm() / math.sqrt(target.numel())
        wanted = target / size if size > 0 else target
        groups = [
            {"params": list(self.levels), "lr": FACTOR_RATE},
            {"params": [self.logits], "lr": CHOICE_RATE},
        ]
        optimizer = torch.optim.Adam(groups)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                gaps = (self.matrix() - wanted).abs().square().mean((1, 2))
                gaps.sum().backward()
                optimizer.step()
                if float(gaps.detach().min()) < 1e-4:
                    break
        with torch.no_grad():
            self.levels[-1].mul_(size)
        return self

    def polished(self, target: Tensor, gram: Tensor | None, steps: int) -> RelaxedButterfly:
        """The best start with rounded permutations, finished by L-BFGS; never worse than it was."""
        with torch.no_grad():
            rounded = [self._rounded(at) for at in range(len(self.levels[0]))]
            loss = _loss(target, gram)
            best = min(rounded, key=lambda one: float(loss(one.matrix()[0])))
            before, kept = float(loss(best.matrix()[0])), [w.clone() for w in best.levels]
        leaves = [w.detach().clone().requires_grad_() for w in best.levels]
        best.__dict__["levels"] = leaves
        optimizer = torch.optim.LBFGS(
            leaves, max_iter=steps, history_size=20, line_search_fn="strong_wolfe",
            tolerance_grad=1e-14, tolerance_change=1e-16,
        )  # fmt: skip
        scale = before if before > 0 else 1.0

        def closure() -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                value = loss(best.matrix()[0]) / scale
                value.backward()
            return value

        if before > 0:
            optimizer.step(closure)
        with torch.no_grad():
            after = float(loss(best.matrix()[0]))
            if not after <= before:
                best.__dict__["levels"] = kept
            _scaled(best, target, gram)
        return best

    def _rounded(self, start: int) -> RelaxedButterfly:
        levels = [w.detach()[start, 0] if self.tied else w.detach()[start] for w in self.levels]
        orders = self.hard
        if orders is None:
            orders = []
            if self.layout == "bp":
                at = torch.arange(self.n, dtype=torch.float64)[None, :, None]
                choices = (self.logits.detach()[start] > 0).double()
                orders = [_relaxed(at, p[None])[0, :, 0].round().long() for p in choices]
        return RelaxedButterfly.of(levels, orders, self.n, self.depth)


def _relaxed(x: Tensor, p: Tensor) -> Tensor:
    """The mixture of permutations of ``x (starts, n, k)``, with ``p (starts, log2(n) - 1, 3)``."""
    starts, n, k = x.shape
    for level in range(p.shape[1]):
        size = n >> level
        y = x.reshape(starts, n // size, size, k)
        q = p[:, level, :, None, None, None].to(x.dtype)
        split = torch.cat([y[:, :, ::2], y[:, :, 1::2]], 2)
        y = (1 - q[:, 0]) * y + q[:, 0] * split
        first, second = y[:, :, : size // 2], y[:, :, size // 2 :]
        first = (1 - q[:, 1]) * first + q[:, 1] * first.flip(2)
        second = (1 - q[:, 2]) * second + q[:, 2] * second.flip(2)
        x = torch.cat([first, second], 2).reshape(starts, n, k)
    return x


def _loss(target: Tensor, gram: Tensor | None) -> Callable[[Tensor], Tensor]:
    def loss(matrix: Tensor) -> Tensor:
        gap = target - matrix
        return (gap if gram is None else gap @ gram).mul(gap.conj()).real.sum()

    return loss


def _scaled(found: RelaxedButterfly, target: Tensor, gram: Tensor | None) -> None:
    """The multiple of the matrix that is nearest: the fit is then no worse than nothing."""
    made = found.matrix()[0]
    weighed = made if gram is None else made @ gram
    size = float((weighed * made.conj()).real.sum())
    if size > 0:
        best = float((weighed * target.conj()).real.sum()) / size
        found.__dict__["levels"][-1] = found.levels[-1].detach() * best
