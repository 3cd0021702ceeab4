"""Structure families: one file each, joined to everything by one line in :data:`FAMILIES`.

The line makes a family take part in pricing, fitting, selection, reporting, saving and the
contract test suite.
"""

from __future__ import annotations

from structc.families.base import AbstractFamily, AbstractStructured
from structc.families.blast import Blast
from structc.families.block_diagonal import BlockDiagonal
from structc.families.block_sparse import BlockSparse
from structc.families.butterfly import Butterfly
from structc.families.dense import Dense
from structc.families.kronecker import Kronecker
from structc.families.low_rank import LowRank
from structc.families.monarch import Monarch
from structc.families.pixelfly import Pixelfly

FAMILIES: tuple[type[AbstractFamily], ...] = (
    Dense,
    LowRank,
    Monarch,
    Blast,
    BlockDiagonal,
    BlockSparse,
    Kronecker,
    Pixelfly,
    Butterfly,
)
BY_NAME: dict[str, type[AbstractFamily]] = {family.name: family for family in FAMILIES}

__all__ = [
    "BY_NAME",
    "FAMILIES",
    "AbstractFamily",
    "AbstractStructured",
    "Blast",
    "BlockDiagonal",
    "BlockSparse",
    "Butterfly",
    "Dense",
    "Kronecker",
    "LowRank",
    "Monarch",
    "Pixelfly",
]
