"""Ragged Monarch: every block of the grid has a rank of its own, as the weight needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, balanced, with_epilogue
from structc.families.fits import analytic, gaussian_tail, refuse_grid, refuse_rank
from structc.forms import Sparse, Tile
from structc.numerics import squared_norm
from structc.records import Hyper, Refusal

SWEEPS, PROGRESS = 6, 1e-3


@final
class RaggedMonarch(AbstractStructured):
    """Monarch whose ranks are spent where they save most: groups of g ranks, each of one block.

    Math:    y[b] = sum of w2[e] @ (w1[e] @ x[a_e]) over the groups e of output block b.
    Shapes:  x (..., k*i);  w1 (G, g, i), w2 (G, l, g) with groups sorted by output block;  inputs
             (G,), edges (G + 1,), outputs (j + 1,), order (G,) of int64;  y (..., j*l).
    Cost:    flops = 2*rows*G*g*(i + l);  params = G*g*(i + l).
    Errors:  none; a grid that does not divide the sizes and a number of groups that no choice of
             ranks has are Refusals of fit.
    Source:  the G largest groups of singular values of all blocks are the Frobenius optimum among
             whole groups; weighted by block coordinate descent, as Monarch.

    >>> w = torch.zeros(8, 8)
    >>> w[:4, 4:] = torch.randn(4, 4)  # one block has it all
    >>> m = RaggedMonarch.fit(w, in_blocks=2, out_blocks=2, width=2, groups=2)
    >>> m.inputs.tolist(), m.fit_error < 1e-6
    ([1, 1], True)
    """

    name: ClassVar[str] = "ragged_monarch"
    inputs: Tensor
    edges: Tensor
    outputs: Tensor
    order: Tensor

    def __init__(
        self, w1: Tensor, w2: Tensor, inputs: Tensor, outputs: Tensor, in_blocks: int
    ) -> None:
        super().__init__(in_blocks * w1.shape[2], (len(outputs) - 1) * w2.shape[1])
        self.in_blocks = in_blocks
        self.w1, self.w2 = nn.Parameter(w1), nn.Parameter(w2)
        self.register_buffer("inputs", inputs)
        self.register_buffer("outputs", outputs)
        self.register_buffer("edges", torch.arange(len(inputs) + 1))
        self.register_buffer("order", torch.arange(len(inputs)))

    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        return ()  # measured on trained weights: within 1.4 % of Monarch, either way

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        g, groups = hyper["width"], hyper["groups"]
        i, l = in_features // hyper["in_blocks"], out_features // hyper["out_blocks"]
        up = Sparse(g * groups, in_features, g, i, groups)
        down = Sparse(out_features, g * groups, l, g, groups)
        return with_epilogue(Tile((up, down)), bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        k, j, g, groups = (hyper[h] for h in ("in_blocks", "out_blocks", "width", "groups"))
        outputs = torch.arange(j + 1) * groups // j
        return cls(
            torch.empty(groups, g, in_features // k, dtype=dtype),
            torch.empty(groups, out_features // j, g, dtype=dtype),
            torch.arange(groups) % k,
            outputs,
            k,
        )

    @classmethod
    @analytic
    def fit(
        cls,
        weight: Tensor,
        gram: Tensor | None = None,
        *,
        in_blocks: int,
        out_blocks: int,
        width: int,
        groups: int,
    ) -> Self | Refusal:
        """Spend the groups where they save most; under a Gram also by what outputs lose.

        Args:
            weight: ``(m, n)``, any floating dtype; fitted in float64, returned in its own.
            gram: ``E[x x^T]``, ``(n, n)``; None is the identity.
            in_blocks, out_blocks: the grid; they must divide n and m.
            width: ranks of a group.
            groups: how many groups all blocks have together.
        """
        if refusal := refuse_grid(cls.name, weight, in_blocks, out_blocks):
            return refusal
        i, l = weight.shape[1] // in_blocks, weight.shape[0] // out_blocks
        if refusal := refuse_rank(cls.name, width, min(i, l)) or refuse_rank(
            cls.name, groups, in_blocks * out_blocks * (min(i, l) // max(1, width))
        ):
            return refusal
        blocks = weight.reshape(out_blocks, l, in_blocks, i).permute(2, 0, 1, 3)  # (k, j, l, i)
        ranks = _ranks(blocks, None, width, groups)
        found = _cut(blocks, None, ranks)
        if gram is not None:
            metrics = gram.reshape(in_blocks, i, in_blocks, i)[
                range(in_blocks), :, range(in_blocks)
            ]
            aware = _ranks(blocks, metrics, width, groups)
            starts = [(ranks, found), (aware, _cut(blocks, metrics, aware))]
            tried = [(r, *_descended(blocks, gram, r, start)) for r, start in starts]
            ranks, found, _ = min(tried, key=lambda t: t[2])
        return cls._of(ranks, found, width)

    @classmethod
    def _of(cls, ranks: Tensor, found: Blocks, width: int) -> Self:
        """Groups of ranks, sorted by output block, each balanced."""
        w1, w2, inputs, counts = [], [], [], []
        k, j = ranks.shape
        for b in range(j):
            counts.append(int(ranks[:, b].sum()) // width)
            for a in range(k):
                p, q = found[a][b]
                for at in range(0, int(ranks[a, b]), width):
                    left, right = balanced(p[:, at : at + width], q[at : at + width])
                    w1.append(right)
                    w2.append(left)
                    inputs.append(a)
        outputs = torch.tensor([0, *counts]).cumsum(0)
        return cls(torch.stack(w1), torch.stack(w2), torch.tensor(inputs), outputs, k)

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        k, j = hyper["in_blocks"], hyper["out_blocks"]
        mean = hyper["width"] * hyper["groups"] / (k * j)  # blocks of noise get equal ranks
        return gaussian_tail(out_features // j, in_features // k, mean)

    @classmethod
    def output_blocks(cls, hyper: Hyper) -> int:
        return int(hyper["out_blocks"])

    def mix_outputs(self, mix: Tensor) -> None:
        owner = torch.arange(len(mix)).repeat_interleave(self.outputs.diff())
        left, right = balanced(mix[owner] @ self.w2.data, self.w1.data)
        self.w2.data, self.w1.data = left.contiguous(), right.contiguous()

    def hyper(self) -> Hyper:
        groups, width, _ = self.w1.shape
        j = len(self.outputs) - 1
        return {"in_blocks": self.in_blocks, "out_blocks": j, "width": width, "groups": groups}

    def factors(self) -> list[Tensor]:
        return [self.w1, self.edges, self.inputs, self.w2, self.outputs, self.order]

    def to_dense(self) -> Tensor:
        k, j = self.in_blocks, len(self.outputs) - 1
        products = self.w2 @ self.w1
        owner = torch.arange(j, device=products.device).repeat_interleave(self.outputs.diff())
        _, l, i = products.shape
        dense = products.new_zeros(j * k, l, i).index_add(0, owner * k + self.inputs, products)
        return dense.reshape(j, k, l, i).transpose(1, 2).reshape(j * l, k * i)


Blocks = list[list[tuple[Tensor, Tensor]]]
"""P (l, r_ab) and Q (r_ab, i) of block (a, b), by input block and output block."""


def _roots(metrics: Tensor) -> Tensor:
    lam, vectors = torch.linalg.eigh(metrics)
    return vectors * lam.clamp_min(0).sqrt()[:, None, :]


def _ranks(blocks: Tensor, metrics: Tensor | None, width: int, groups: int) -> Tensor:
    """Ranks (k, j) by the largest groups of singular values, of the blocks or of what they give."""
    seen = blocks if metrics is None else blocks @ _roots(metrics)[:, None]
    values = torch.linalg.svdvals(seen)
    many = values.shape[-1] // width
    energy = values[..., : many * width].square().unflatten(-1, (many, width)).sum(-1)
    chosen = torch.zeros(energy.numel(), dtype=torch.int64)
    chosen[energy.flatten().sort(descending=True, stable=True).indices[:groups]] = 1
    return chosen.reshape(energy.shape).sum(-1) * width


def _cut(blocks: Tensor, metrics: Tensor | None, ranks: Tensor) -> Blocks:
    """Each block truncated to its rank, in its own metric."""
    k, j = ranks.shape
    return [
        [
            _truncated(blocks[a, b], None if metrics is None else metrics[a], int(ranks[a, b]))
            for b in range(j)
        ]
        for a in range(k)
    ]


def _truncated(target: Tensor, metric: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of a rank in a metric: P orthonormal, Q = P^T T; strongest ranks first."""
    seen = target if metric is None else target @ _roots(metric[None])[0]
    p = torch.linalg.svd(seen, full_matrices=False)[0][:, :rank]
    return p, p.mT @ target


def _descended(blocks: Tensor, gram: Tensor, ranks: Tensor, start: Blocks) -> tuple[Blocks, float]:
    """Block coordinate descent with these ranks; each step is exact, so the error never rises."""
    k, j, _, i = blocks.shape
    pairs = gram.reshape(k, i, k, i).transpose(1, 2)
    metrics = pairs[range(k), range(k)]
    inverses = torch.linalg.pinv(metrics, hermitian=True)
    best = start
    gaps = blocks - torch.stack([torch.stack([p @ q for p, q in row]) for row in start])
    error = _squared(gaps, gram)
    found = [list(row) for row in start]
    for _ in range(SWEEPS):
        for a in range(k):
            pull = torch.einsum("bjli,bih->jlh", gaps, pairs[:, a]) - gaps[a] @ metrics[a]
            targets = blocks[a] + pull @ inverses[a]
            for b in range(j):
                found[a][b] = _truncated(targets[b], metrics[a], int(ranks[a, b]))
                gaps[a, b] = blocks[a, b] - found[a][b][0] @ found[a][b][1]
        now = _squared(gaps, gram)
        if now >= error:
            break
        done = now > error * (1 - PROGRESS)
        best, error = [list(row) for row in found], now
        if done:
            break
    return best, error


def _squared(gaps: Tensor, gram: Tensor) -> float:
    return squared_norm(gaps.permute(1, 2, 0, 3).flatten(2).flatten(0, 1), gram)
