"""Sizes that a kernel is compiled with: frozen data, pruned before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from structc.codegen.program import Stage


@dataclass(frozen=True)
class Config:
    """How one stage is cut up.

    Attributes:
        bm, bn, bk: rows, outputs and columns of a tile; powers of two.
        warps: of a program.
        stages: tiles of the loop over columns that are on their way at a time.
        groups: blocks that a program takes together.
        split: programs that share the columns of an output, whose sums are added up afterwards.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    groups: int = 1
    split: int = 1

    def constexprs(self, names: Sequence[str]) -> dict[str, int]:
        """The compile-time arguments of a kernel, those that it names."""
        every = {
            "BM": self.bm, "BN": self.bn, "BK": self.bk, "BG": self.groups, "SPLIT": self.split
        }  # fmt: skip
        return {name: every[name] for name in names}

    def __str__(self) -> str:
        words = ["{bm}x{bn}x{bk}, {warps} warps, {stages} stages".format(**asdict(self))]
        words += [f"{self.groups} blocks"] if self.groups > 1 else []
        words += [f"split {self.split}"] if self.split > 1 else []
        return ", ".join(words)


DOT = 16
"""Least rows, outputs and columns of a product of matrices."""
PRODUCTS = ("panel", "sparse", "turned", "pair", "bottleneck", "coupled", "convolve", "chain")
"""Kinds of stages that multiply matrices."""
FEW = 128
"""Rows up to which programs may share the columns of an output."""
VECTOR = 8
"""Rows up to which each may be a product with a vector."""
_TILES = (
    (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 3), (128, 32, 64, 4, 3), (32, 64, 64, 4, 3), (64, 32, 32, 4, 3),
    (16, 64, 64, 4, 3), (16, 128, 64, 4, 3), (32, 32, 32, 4, 2), (16, 16, 16, 1, 2),
)  # fmt: skip
"""Tiles of products, the largest first."""
_ROWS = ((16, 256), (8, 512), (4, 1024), (2, 1024), (32, 128), (8, 128), (64, 64), (1, 2048))
"""Outputs and columns of a product with a vector."""
THIN = 4
"""Rows or columns of a strided block below which it is no product of matrices."""
_SPLITS = (2, 4, 8, 16)
_BLOCKS = (
    (64, 32, 16, 8, 2, 16), (32, 32, 16, 8, 2, 16), (32, 16, 16, 8, 3, 16), (32, 32, 32, 8, 2, 8),
    (64, 16, 16, 8, 2, 16), (16, 64, 16, 8, 2, 16), (16, 32, 16, 8, 2, 16), (16, 16, 16, 8, 2, 16),
    (16, 32, 32, 8, 2, 32), (32, 64, 32, 4, 2, 4), (16, 16, 16, 4, 2, 4), (64, 64, 32, 4, 2, 1),
    (16, 16, 16, 4, 2, 1),
)  # fmt: skip
"""Tiles of products with several blocks at a time; those are the last number."""
_ON_CHIP = (
    (128, 64, 64, 8, 2), (128, 32, 32, 8, 2), (64, 128, 64, 8, 2), (64, 64, 64, 4, 2),
    (64, 64, 32, 8, 2), (64, 32, 32, 4, 2), (32, 64, 64, 4, 2), (32, 64, 32, 8, 2),
    (32, 32, 32, 4, 2), (16, 64, 64, 4, 2), (16, 32, 16, 8, 2), (16, 16, 16, 4, 2),
)  # fmt: skip
"""Tiles of two products that hold what is between."""
_CHAINS = tuple(
    Config(bm, bn, bk, warps, 2, groups)
    for bm, bn, bk, warps, groups in (
        (16, 32, 32, 8, 16), (16, 16, 16, 8, 32), (16, 32, 32, 8, 8), (16, 16, 16, 4, 16),
        (16, 64, 32, 4, 4), (32, 32, 32, 8, 8), (32, 64, 32, 8, 4), (64, 64, 32, 8, 2),
        (64, 64, 64, 4, 1), (16, 32, 16, 4, 4),
    )
)  # fmt: skip
"""Rows, outputs and columns of a factor at most, warps, and blocks at most."""
_TRANSFORMS = (
    (1, 4, 1), (1, 8, 1), (2, 8, 1), (2, 4, 1), (4, 8, 1), (4, 4, 1), (1, 2, 1), (1, 16, 1),
)  # fmt: skip
"""Rows, warps and stages of a transform."""
_WHOLE = (
    (64, 64, 1, 4, 1), (32, 64, 1, 4, 1), (16, 128, 1, 4, 1), (32, 128, 1, 8, 1),
    (8, 256, 1, 4, 1), (4, 512, 1, 4, 1), (1, 1024, 1, 4, 1), (128, 32, 1, 4, 1),
)  # fmt: skip
"""Tiles of what goes entry by entry."""


def checked(data: Mapping[str, Any]) -> Config:
    """A config from plain data.

    Errors: ``KeyError``, ``TypeError``, ``ValueError`` for what is none.
    """
    config = Config(**{f.name: int(data[f.name]) for f in fields(Config)})
    sizes = (config.bm, config.bn, config.bk, config.groups, config.warps)
    if any(n < 1 or n & (n - 1) for n in sizes):
        raise ValueError(f"no powers of two: {config}")
    if config.split < 1 or config.stages < 1:
        raise ValueError(f"below 1: {config}")
    return config


def multiplies(stage: Stage, config: Config) -> bool:
    """Whether a stage is made of products of matrices; some are for one config, not for another."""
    return stage.kind in PRODUCTS or (stage.kind == "strided" and config.bk > 1)


def power_above(n: int) -> int:
    """The least power of two from ``n`` on.

    >>> power_above(5), power_above(8)
    (8, 8)
    """
    return 1 << max(0, n - 1).bit_length()


def configs(stage: Stage, rows: int) -> list[Config]:
    """What may be tried for a stage at so many rows, without what only adds empty lanes."""
    product = stage.kind in PRODUCTS
    least, block = DOT if product else 1, stage.block
    outputs = block.b if product else block.d if stage.kind == "strided" else stage.out
    columns = stage.inner[0].block.c if stage.inner else block.c
    if stage.kind == "chain":
        return [c for c in _CHAINS if c.bm <= max(DOT, power_above(rows))]
    if stage.kind == "convolve":
        most = power_above(rows)
        return [Config(bm, 1, 1, w, s) for bm, w, s in _TRANSFORMS if bm <= most]
    shapes: tuple[tuple[int, ...], ...] = _TILES if product else _WHOLE
    if stage.kind in ("turned", "pair"):
        shapes = _BLOCKS
    elif stage.inner:
        shapes = _ON_CHIP
    found = [
        Config(
            min(bm, max(least, power_above(rows))),
            min(bn, max(least, power_above(outputs))),
            min(bk, max(least, power_above(columns))) if product else 1,
            warps,
            stages,
            min(groups[0], power_above(block.a * block.d)) if groups else 1,
        )
        for bm, bn, bk, warps, stages, *groups in shapes
    ]
    if stage.kind == "panel":
        found = [*_few(stage, rows, found), *found]
    if stage.kind == "strided" and min(block.b, block.c) >= THIN:
        found = [*configs(replace(stage, kind="turned"), rows), *found]
    return list(dict.fromkeys(found))


def _few(stage: Stage, rows: int, tiles: Sequence[Config]) -> Iterator[Config]:
    """What few rows may take besides tiles."""
    b, c = stage.block.b, stage.block.c
    if rows <= VECTOR:
        for bn, bk in _ROWS:
            yield Config(1, min(bn, power_above(b)), min(bk, power_above(c)), 4, 1)
    if rows <= FEW:
        for config in tiles:
            for split in _SPLITS:
                if c >= 2 * split * config.bk and config.bm <= max(DOT, power_above(rows)):
                    yield replace(config, split=split)
