"""Exact structure in one matrix, found algebraically and accepted by a measured residual only.

Each recogniser is one file and one line of :data:`RECOGNISERS`, cheap ones first. Beside the
matrix they know the rounding of its dtype: a bfloat16 DFT is a DFT.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from structc.recognition.base import Array, Matrix, Proposal, Recogniser, Recognition, read, shifted
from structc.recognition.blocks import block_diagonal
from structc.recognition.build import rescaled
from structc.recognition.dictionary import dictionary
from structc.recognition.displacement import displacement
from structc.recognition.kronecker import kronecker
from structc.recognition.monarch import monarch
from structc.recognition.permuted import permuted_transforms
from structc.recognition.permuted_circulant import permuted_circulants
from structc.recognition.permuted_monarch import permuted_monarch
from structc.recognition.rank import low_rank
from structc.recognition.scaled import scaled
from structc.recognition.shifts import circulant, hankel, toeplitz
from structc.recognition.trivial import one_a_row, zero

RECOGNISERS: tuple[Recogniser, ...] = (
    zero,
    one_a_row,
    block_diagonal,
    circulant,
    toeplitz,
    hankel,
    dictionary,
    low_rank,
    permuted_transforms,
    kronecker,
    scaled,
    permuted_circulants,
    displacement,
    monarch,
    permuted_monarch,
)
"""In the order in which they are asked; the first structure that holds is the answer.

Cheap ones first, and of those that may hold together the one with fewer parameters: a DFT is a
Monarch matrix and a Hadamard matrix a Kronecker product too.
"""

LOCAL, LOCAL_NARROW = 8.0, 2.0
"""A row or a column may differ by so many times what the whole may; in 16 bits, whose values come
from rounding alone, by less."""
NARROW = 1e-4
"""Tolerances above this are those of 16-bit dtypes."""
SILENT = 1e-10
"""Rows and columns so small beside the largest are what is left of zeros: sin(pi k), say."""
RANKED = ("low_rank", "kronecker", "displacement", "monarch", "permuted monarch")
"""Classes whose next member is always a little nearer: rounding alone must explain the rest."""
ROUNDING = 0.6
"""Relative error of rounding, at most, in units in the last place."""

__all__ = ["RECOGNISERS", "Recognition", "recognize"]


def recognize(weight: Tensor) -> Recognition | None:
    """The exact structure of a matrix, or None.

    Args:
        weight: ``(m, n)``, of any dtype, finite or not; what it holds never raises.

    Returns:
        The first structure of :data:`RECOGNISERS` whose factors reproduce the weight within the
        rounding of its dtype. Factors are float64 or complex128.

    Raises:
        ConfigError: the argument is no matrix with values.

    >>> n = torch.arange(64.0, dtype=torch.float64)
    >>> dct = torch.cos(torch.pi / 64 * n[:, None] * (n + 0.5))
    >>> found = recognize(dct[torch.randperm(64)][:, torch.randperm(64)])
    >>> found.name, found.residual < 1e-12
    ('permuted dct2', True)
    >>> recognize(torch.randn(64, 64)) is None
    True
    """
    matrix = read(weight)
    if matrix is None:
        return None
    with torch.no_grad(), np.errstate(all="ignore"):
        for recogniser in RECOGNISERS:
            for proposal in recogniser(matrix):
                if found := _verified(matrix, proposal):
                    return found
    return None


def _holds_everywhere(gap: Array, matrix: Matrix, axis: int) -> bool:
    """Whether no row (or column) is much worse than the whole.

    A few entries that are larger than all others could hide that the rest is not reproduced.
    """
    norms = np.linalg.norm(matrix.values, axis=axis)
    seen = norms > SILENT * norms.max()
    allowed = (LOCAL if matrix.tolerance < NARROW else LOCAL_NARROW) * matrix.tolerance
    return bool((np.linalg.norm(gap, axis=axis) <= allowed * norms)[seen].all())


def _verified(matrix: Matrix, proposal: Proposal) -> Recognition | None:
    """The proposal with its measured residual, if that is within the rounding of the matrix."""
    gap = proposal.family.to_dense().numpy() - matrix.values
    residual = float(np.linalg.norm(gap)) / (matrix.norm or 1.0)
    ranked = matrix.tolerance >= NARROW and proposal.name in RANKED
    limit = (ROUNDING if ranked else 1.0) * matrix.tolerance
    if not residual <= limit:  # also refuses a residual that is NaN
        return None
    if sum(p.numel() for p in proposal.family.parameters()) > matrix.values.size:
        return None  # as many numbers as the matrix has fit anything
    if not all(_holds_everywhere(gap, matrix, axis) for axis in (0, 1)):
        return None
    return Recognition(
        name=proposal.name,
        family=rescaled(proposal.family, matrix.exponent) if matrix.exponent else proposal.family,
        residual=residual,
        max_error=float(shifted(np.abs(gap).max(), matrix.exponent)),
        tolerance=matrix.tolerance,
        words=proposal.words,
    )
