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
from structc.families.circulant import Circulant
from structc.families.dense import Dense
from structc.families.diagonal import Diagonal
from structc.families.displacement import Displacement
from structc.families.hankel import Hankel
from structc.families.kronecker import Kronecker
from structc.families.learned_butterfly import LearnedButterfly
from structc.families.low_rank import LowRank
from structc.families.monarch import Monarch
from structc.families.pixelfly import Pixelfly
from structc.families.product import Product
from structc.families.ragged_monarch import RaggedMonarch
from structc.families.selection import Selection
from structc.families.sum import Sum
from structc.families.toeplitz import Toeplitz
from structc.families.transform import Transform

FAMILIES: tuple[type[AbstractFamily], ...] = (
    Dense,
    LowRank,
    Monarch,
    RaggedMonarch,
    Blast,
    BlockDiagonal,
    BlockSparse,
    Kronecker,
    Pixelfly,
    Butterfly,
    LearnedButterfly,
    Circulant,
    Toeplitz,
    Hankel,
    Displacement,
    Diagonal,
    Selection,
    Transform,
    Product,
    Sum,
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
    "Circulant",
    "Dense",
    "Diagonal",
    "Displacement",
    "Hankel",
    "Kronecker",
    "LearnedButterfly",
    "LowRank",
    "Monarch",
    "Pixelfly",
    "Product",
    "RaggedMonarch",
    "Selection",
    "Sum",
    "Toeplitz",
    "Transform",
]
