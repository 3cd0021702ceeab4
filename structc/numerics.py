"""Error measures, tolerances by dtype, and seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative output error of a whole model that still counts as exact.

    About 50 rounding steps of the dtype: another summation order in each of a few dozen layers
    moves a model by that much, an approximation by far more.
    """
    return _TOLERANCE.get(dtype, _TOLERANCE[torch.float32])


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``||value - reference|| / ||reference||`` in float64 (Frobenius).

    An empty or zero reference gives 0 when the value equals it and infinity otherwise; a value
    that is not finite where the reference is gives infinity.

    >>> relative_error(torch.tensor([1.1]), torch.tensor([1.0]))
    0.1000...
    """
    wide = torch.complex128 if reference.is_complex() else torch.float64
    a, b = value.detach().to(wide), reference.detach().to(wide)
    finite = torch.isfinite(b)
    if not bool(finite.all()):  # equal infinities (masked scores) are no error
        same = (a == b) | (torch.isnan(a) & torch.isnan(b))
        if bool((~finite & ~same).any()):
            return math.inf
        a, b = a[finite], b[finite]
    scale, gap = float(b.norm()), float((a - b).norm())
    if gap == 0:
        return 0.0
    if not math.isfinite(gap):
        return math.inf
    return gap / scale if scale > 0 else math.inf


def output_error(output: Any, reference: Any, mask: Tensor | None = None) -> float:
    """Largest relative error over the floating leaves of two model outputs.

    Args:
        output, reference: pytrees of the same shape (tensors, tuples, dicts, model outputs).
        mask: ``(B, T)``, nonzero where tokens count; leaves of shape ``(B, T, ...)`` are compared
            there alone, so that padding does not count.
    """
    ours, theirs = list(float_leaves(output)), list(float_leaves(reference))
    if len(ours) != len(theirs):
        return math.inf
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return math.inf
        if mask is not None and a.shape[: mask.dim()] == mask.shape:
            keep = mask.to(torch.bool)
            a, b = a[keep], b[keep]
        worst = max(worst, relative_error(a, b))
    return worst


def float_leaves(output: Any) -> Iterator[Tensor]:
    """The floating and complex tensors in a model's output, in a fixed order."""
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.is_complex():
            yield output
    elif isinstance(output, dict):  # ModelOutput is one; its order is the field order
        for value in output.values():
            yield from float_leaves(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from float_leaves(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from float_leaves(getattr(output, field.name))


def weighted_error(
    weight: Tensor, approx: Tensor, gram: Tensor | None, out_gram: Tensor | None = None
) -> float:
    """``sqrt(tr(G (W-M) C (W-M)^T) / tr(G W C W^T))``: relative output error for inputs of Gram C.

    Args:
        weight, approx: ``(out_features, in_features)``.
        gram: C, ``(in_features, in_features)``; None counts as the identity.
        out_gram: G, ``(out_features, out_features)``; None counts as the identity.
    """
    w = weight.detach().double()
    gap = w - approx.detach().double()
    left = (lambda a: a) if out_gram is None else (lambda a: out_gram.double() @ a)
    right = (lambda a: a) if gram is None else (lambda a: a @ gram.double())
    top, bottom = ((left(right(a)) * a).sum() for a in (gap, w))
    if float(top) <= 0:
        return 0.0
    return math.sqrt(float(top) / float(bottom)) if float(bottom) > 0 else math.inf


def regularised(gram: Tensor, amount: float = 1e-4) -> Tensor:
    """``C + amount * mean(diag C) * I``: keeps every step of a weighted fit well posed.

    The matrix itself is changed, not only the inverses inside a fit, so that all steps go on
    minimising one stated objective.
    """
    level = float(gram.diagonal().mean()) * amount
    return gram + max(level, torch.finfo(gram.dtype).tiny) * torch.eye(len(gram), dtype=gram.dtype)


def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own, so that nobody's global random state moves."""
    return torch.Generator().manual_seed(seed)
