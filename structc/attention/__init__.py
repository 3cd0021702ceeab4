"""Attention methods: one file each, mathematics only, joined by one line in :data:`METHODS`.

:func:`exact` is attention itself, fast for every mask. The methods approximate it; each is called
as ``method(q, k, v)`` and works alone.
"""

from __future__ import annotations

from structc.attention.base import AbstractMethod, Certificate, certify, merge
from structc.attention.block_sparse import BlockSparse
from structc.attention.conv_basis import ConvBasis
from structc.attention.exact import exact
from structc.attention.methods import METHODS
from structc.attention.monarch import Monarch
from structc.attention.nystrom import Nystrom
from structc.attention.polynomial import Polynomial
from structc.attention.row_column_toeplitz import RowColumnToeplitz
from structc.attention.sparse_low_rank import SparseLowRank
from structc.attention.tiled_monarch import TiledMonarch
from structc.attention.toeplitz_polynomial import ToeplitzPolynomial
from structc.attention.uniform import Uniform
from structc.attention.window_sinks import WindowSinks

__all__ = [
    "METHODS",
    "AbstractMethod",
    "BlockSparse",
    "Certificate",
    "ConvBasis",
    "Monarch",
    "Nystrom",
    "Polynomial",
    "RowColumnToeplitz",
    "SparseLowRank",
    "TiledMonarch",
    "ToeplitzPolynomial",
    "Uniform",
    "WindowSinks",
    "certify",
    "exact",
    "merge",
]
