"""The table of attention methods: a new one joins by its line."""

from __future__ import annotations

from collections.abc import Mapping

from structc.attention.base import AbstractMethod
from structc.attention.block_sparse import BlockSparse
from structc.attention.conv_basis import ConvBasis
from structc.attention.monarch import Monarch
from structc.attention.nystrom import Nystrom
from structc.attention.polynomial import Polynomial
from structc.attention.row_column_toeplitz import RowColumnToeplitz
from structc.attention.sparse_low_rank import SparseLowRank
from structc.attention.tiled_monarch import TiledMonarch
from structc.attention.toeplitz_polynomial import ToeplitzPolynomial
from structc.attention.uniform import Uniform
from structc.attention.window_sinks import WindowSinks

METHODS: tuple[type[AbstractMethod], ...] = (
    Uniform,
    WindowSinks,
    ConvBasis,
    RowColumnToeplitz,
    Polynomial,
    ToeplitzPolynomial,
    Monarch,
    TiledMonarch,
    BlockSparse,
    SparseLowRank,
    Nystrom,
)
"""Cheap ones first."""

BY_NAME: Mapping[str, type[AbstractMethod]] = {m.name: m for m in METHODS}
