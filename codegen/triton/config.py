"""Sizes that a kernel is compiled with: frozen data, pruned before anything is timed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from structc.codegen.program import Stage


@dataclass(frozen=True)
class Config:
    """How one stage is cut up.

    Attributes:
        bm, bn, bk: rows, outputs and columns of a tile; powers of two.
        warps: of a program.
        stages: tiles of the loop over columns that are on their way at a time.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int

    def constexprs(self) -> dict[str, int]:
        """The compile-time arguments of a kernel."""
        return {"BM": self.bm, "BN": self.bn, "BK": self.bk}

    def __str__(self) -> str:
        return "{bm}x{bn}x{bk}, {warps} warps, {stages} stages".format(**asdict(self))


DOT = 16
"""Least rows, outputs and columns of a product of matrices."""
PRODUCTS = ("panel", "sparse")
"""Kinds of stages that multiply matrices."""
_SHAPES = (
    (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 3), (128, 32, 64, 4, 3), (32, 64, 64, 4, 3), (64, 32, 32, 4, 3),
    (16, 64, 64, 4, 3), (16, 128, 64, 4, 3), (32, 32, 32, 4, 2), (16, 16, 16, 1, 2),
)  # fmt: skip
"""Tiles of products, the largest first."""
_WHOLE = ((64, 64, 1, 4, 1), (16, 128, 1, 4, 1), (8, 256, 1, 4, 1), (1, 1024, 1, 4, 1))
"""Tiles of what goes entry by entry."""


def power_above(n: int) -> int:
    """The least power of two from ``n`` on.

    >>> power_above(5), power_above(8)
    (8, 8)
    """
    return 1 << max(0, n - 1).bit_length()


def configs(stage: Stage, rows: int) -> Iterator[Config]:
    """What may be tried for a stage at so many rows, without what only adds empty lanes."""
    product = stage.kind in PRODUCTS
    outputs = stage.block.b if product else stage.block.d if stage.kind == "strided" else stage.out
    seen = set()
    for bm, bn, bk, warps, stages in _SHAPES if product else _WHOLE:
        least = DOT if product else 1
        made = Config(
            min(bm, max(least, power_above(rows))),
            min(bn, max(least, power_above(outputs))),
            min(bk, max(least, power_above(stage.block.c))) if product else 1,
            warps,
            stages,
        )
        if made not in seen:
            seen.add(made)
            yield made


@functools.lru_cache(maxsize=4096)
def default(stage: Stage, rows: int) -> Config:
    """The first that does not leave half of its rows empty."""
    found = list(configs(stage, rows))
    return next((c for c in found if c.bm <= max(DOT, rows)), found[-1])
