"""Block diagonal: groups of inputs that reach one group of outputs each, also once reordered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self, final

import scipy.sparse
import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, with_epilogue
from structc.families.fits import analytic, refuse_grid, simulated
from structc.families.solves import least_squares
from structc.forms import Block, Select, Tile
from structc.numerics import weighted_error
from structc.records import Hyper, Refusal

BLOCKS = (2, 4)
ORDERS = ("given", "clustered")
ROUNDS = 12
SAMPLED = 192


@final
class BlockDiagonal(AbstractStructured):
    """Blocks on the diagonal, of the matrix as it is or between two permutations.

    Math:    y[rows[q]] = w[q] @ x[columns[q]] for each block q; with order "given" these are the
             contiguous groups, with "clustered" two permutations say which.
    Shapes:  x (..., g*i);  w (g, l, i);  columns (g*i,) and rows (g*l,) of int64;  y (..., g*l).
    Cost:    flops = 2*rows*g*l*i;  params = g*l*i.
    Errors:  none; blocks that do not divide both sides, an unknown order and weights that are not
             finite are Refusals of fit.
    Source:  least squares per block, in the metric of the input Gram; permutations by connected
             components where the weight has them, else by balanced alternating clustering.

    >>> w = torch.block_diag(torch.randn(3, 2), torch.randn(3, 2))[[0, 3, 1, 4, 2, 5]]
    >>> bool(BlockDiagonal.fit(w, blocks=2, order="given").fit_error > 0)
    True
    >>> BlockDiagonal.fit(w, blocks=2, order="clustered").fit_error
    0.0
    """

    name: ClassVar[str] = "block_diagonal"
    columns: Tensor | None
    places: Tensor | None

    def __init__(
        self, w: Tensor, columns: Tensor | None = None, rows: Tensor | None = None
    ) -> None:
        super().__init__(w.shape[0] * w.shape[2], w.shape[0] * w.shape[1])
        self.w = nn.Parameter(w)
        self.register_buffer("columns", columns)
        self.register_buffer("places", None if rows is None else rows.argsort())

    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        return [
            {"blocks": g, "order": "given"}
            for g in BLOCKS
            if in_features % g == out_features % g == 0
        ]

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        g, n, m = hyper["blocks"], in_features, out_features
        block = Block(g, m // g, n // g, 1)
        if ORDERS.index(hyper["order"]) == 0:
            return with_epilogue(Tile((block,)), bias=bias, activation=activation)
        program = Tile((Select(n, n), block, Select(m, m)))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        g = hyper["blocks"]
        w = torch.empty(g, out_features // g, in_features // g, dtype=dtype)
        if hyper["order"] == "given":
            return cls(w)
        return cls(w, torch.arange(in_features), torch.arange(out_features))

    @classmethod
    @analytic
    def fit(
        cls, weight: Tensor, gram: Tensor | None = None, *, blocks: int, order: str
    ) -> Self | Refusal:
        """Least squares for each block; exact for the groups of inputs and outputs it finds.

        Args:
            weight: ``(m, n)``, any floating dtype; fitted in float64, returned in its own.
            gram: ``E[x x^T]``, ``(n, n)``, positive semidefinite; None is the identity.
            blocks: how many; must divide n and m.
            order: ``"given"``, or ``"clustered"`` to permute inputs and outputs.
        """
        if refusal := refuse_grid(cls.name, weight, blocks, blocks):
            return refusal
        if order not in ORDERS:
            return Refusal("", cls.name, "ORDER", f"order {order!r} is none of {', '.join(ORDERS)}")
        if order == "given":
            groups = torch.arange(len(weight)), torch.arange(weight.shape[1])
            return cls(_solved(weight, gram, *groups, blocks))
        best: tuple[float, Self] | None = None
        sizes = [weight.new_ones(()), *([] if gram is None else [gram.diagonal()])]
        for size in sizes:  # what the weights say alone, and weighed by the size of inputs
            rows, columns = _grouped(weight, weight.square().mul_(size), blocks)
            made = cls(_solved(weight, gram, rows, columns, blocks), columns, rows)
            error = weighted_error(weight, made.to_dense(), gram)
            if best is None or error < best[0]:
                best = error, made
        assert best is not None
        return best[1]

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        g, n, m = hyper["blocks"], in_features, out_features
        free = (1 - 1 / g) ** 0.5
        if hyper["order"] == "given" or g == 1:
            return float(free)
        scale = max(1, min(n, m) // SAMPLED)
        width, height = (max(1, round(side / scale / g)) * g for side in (n, m))
        found = simulated(cls, width, height, hyper)
        # what clustering gains on noise: fluctuations, which shrink with the root of the size
        return float((free**2 - (free**2 - found**2) / scale**0.5) ** 0.5)

    @classmethod
    def output_blocks(cls, hyper: Hyper) -> int:
        return hyper["blocks"] if hyper["order"] == "given" else 0

    def mix_outputs(self, mix: Tensor) -> None:
        if self.columns is not None:
            return super().mix_outputs(mix)
        self.w.data = mix @ self.w.data
        return None

    def hyper(self) -> Hyper:
        return {"blocks": self.w.shape[0], "order": ORDERS[self.columns is not None]}

    def factors(self) -> list[Tensor]:
        if self.columns is None or self.places is None:
            return [self.w]
        return [self.columns, self.w, self.places]

    def to_dense(self) -> Tensor:
        dense = torch.block_diag(*self.w)
        if self.columns is None or self.places is None:
            return dense
        return dense[self.places][:, self.columns.argsort()]


def _solved(
    weight: Tensor, gram: Tensor | None, rows: Tensor, columns: Tensor, blocks: int
) -> Tensor:
    """The best blocks (g, l, i) for given groups: ``W_r C[:, K] C[K, K]^+``."""
    down, right = rows.reshape(blocks, -1), columns.reshape(blocks, -1)
    if gram is None:
        return torch.stack([weight[r][:, c] for r, c in zip(down, right, strict=True)])
    found = []
    for r, c in zip(down, right, strict=True):
        found.append(least_squares(weight[r], gram, c))
    return torch.stack(found)


# ---------------------------------------------------------------------------- groups


def _grouped(weight: Tensor, energy: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Rows and columns ordered so that the diagonal blocks hold much of the energy."""
    parts = _components(weight, blocks)
    if parts is not None:
        return parts
    m, n = weight.shape
    labels = torch.arange(n) * blocks // n  # the order as given is the start
    best, kept = -1.0, (torch.arange(m), torch.arange(n))
    for _ in range(ROUNDS):
        rows = _assigned(_sums(energy, labels, blocks))
        labels = _assigned(_sums(energy.mT, rows, blocks))
        held = float(_sums(energy.mT, rows, blocks).gather(1, labels[:, None]).sum())
        if held <= best * (1 + 1e-6):
            break
        best, kept = held, (rows.argsort(stable=True), labels.argsort(stable=True))
    return kept


def _components(weight: Tensor, blocks: int) -> tuple[Tensor, Tensor] | None:
    """The groups of a weight that is block diagonal up to permutations; None if it is not."""
    m, n = weight.shape
    filled = weight.abs() > 1e-13 * weight.abs().max()
    if int(filled.sum()) > m * n // blocks:
        return None
    entries = scipy.sparse.coo_array(filled.cpu().numpy())
    square = scipy.sparse.block_array([[None, entries], [entries.T, None]])
    count, labels = scipy.sparse.csgraph.connected_components(square, directed=False)
    found = torch.from_numpy(labels).long()
    sizes = [found[:m].bincount(minlength=count), found[m:].bincount(minlength=count)]
    if count != blocks or bool((sizes[0] != m // blocks).any() | (sizes[1] != n // blocks).any()):
        return None
    return found[:m].argsort(stable=True), found[m:].argsort(stable=True)


def _sums(energy: Tensor, labels: Tensor, blocks: int) -> Tensor:
    """Energy of each row in each group of columns, (rows, blocks)."""
    return energy.new_zeros(len(energy), blocks).index_add_(1, labels, energy)


def _assigned(scores: Tensor) -> Tensor:
    """A group for each item, all groups of one size: those who care most choose first."""
    items, groups = scores.shape
    room = [items // groups] * groups
    top = scores.topk(min(2, groups), dim=1).values
    labels = torch.zeros(items, dtype=torch.long)
    ranking = scores.argsort(dim=1, descending=True).tolist()
    for item in (top[:, 0] - top[:, -1]).argsort(descending=True, stable=True).tolist():
        group = next(g for g in ranking[item] if room[g])
        labels[item] = group
        room[group] -= 1
    return labels
