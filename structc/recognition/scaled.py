"""Structures that a diagonal scaling of rows and columns hides."""

from __future__ import annotations

from collections.abc import Iterator

from structc.recognition.base import Matrix, Proposal
from structc.recognition.build import diagonal, product
from structc.recognition.kronecker import kronecker
from structc.recognition.shifts import circulant


def scaled(matrix: Matrix) -> Iterator[Proposal]:
    """W = diag(r) M diag(s) with M circulant or a Kronecker product.

    Math:    |W|^2 has one scaling to equal row and column sums. Squares of a circulant have it
             already, those of a Kronecker product get it factor by factor: M is found up to
             scalings that keep it in its class.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> w = torch.kron(torch.randn(3, 4), torch.randn(5, 6)) * torch.rand(15, 1) * torch.rand(24)
    >>> recognize(w).name
    'scaled kronecker'
    """
    if min(matrix.shape) < 2:
        return
    parts = matrix.balanced
    inner = Matrix(parts.q, 0, matrix.unit)
    for recogniser in (circulant, kronecker):
        for proposal in recogniser(inner):
            family = product([*diagonal(parts.s), proposal.family, *diagonal(parts.r)])
            words = f"{proposal.words} with scaled rows and columns"
            yield Proposal(f"scaled {proposal.name}", family, words)
