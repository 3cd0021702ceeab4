"""Error measures and tolerances by dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structc.errors import ConfigError

ROWS = 512
"""Of a matrix whose norm is taken at a time."""
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
    """Largest error over the tensors in two model outputs.

    That of a floating tensor is its relative error, that of any other (class numbers, token ids,
    masks) the share of its elements that differ. Outputs of numbers and texts alone are compared
    by value.

    Args:
        output, reference: pytrees of the same shape (tensors, tuples, dicts, model outputs), or
            objects that hold them.
        mask: ``(B, T)``, nonzero where tokens count; leaves of shape ``(B, T, ...)`` are compared
            there alone, so that padding does not count.

    Errors: :class:`ConfigError` if nothing in the reference can be compared: an unknown error is
        not an error of zero.
    """
    ours, theirs = tensor_leaves(output), tensor_leaves(reference)
    if not theirs:
        return _plain_error(output, reference)
    if len(ours) != len(theirs):
        return math.inf
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return math.inf
        if mask is not None and a.shape[: mask.dim()] == mask.shape:
            keep = mask.to(torch.bool)
            a, b = a[keep], b[keep]
        worst = max(worst, relative_error(a, b) if _is_float(b) else _share_changed(a, b))
    return worst


def rounding(output: Any, otherwise: float = 0.0) -> float:
    """The error of a model's output that is rounding alone; ``otherwise`` if it has no floats."""
    return max((tolerance(t.dtype) for t in float_leaves(output)), default=otherwise)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _share_changed(value: Tensor, reference: Tensor) -> float:
    return float((value != reference).double().mean()) if reference.numel() else 0.0


def _plain_error(output: Any, reference: Any) -> float:
    """The error of an output without tensors: numbers and texts compare, all else is unknown."""
    theirs, shape = pytree.tree_flatten(reference)
    for value in theirs:
        if value is not None and not isinstance(value, (bool, int, float, complex, str, bytes)):
            raise ConfigError(
                f"output: no tensor can be read in a {type(value).__name__}, so the error of the "
                "model's output is unknown",
                hint="Let forward return tensors, or containers or objects that hold them.",
            )
    ours, ours_shape = pytree.tree_flatten(output)
    if shape != ours_shape:
        return math.inf
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, float) and isinstance(b, float):
            error = relative_error(*(torch.tensor(v, dtype=torch.float64) for v in (a, b)))
        else:
            error = 0.0 if type(a) is type(b) and a == b else math.inf
        worst = max(worst, error)
    return worst


def float_leaves(output: Any) -> Iterator[Tensor]:
    """The floating and complex tensors in a model's output, in a fixed order."""
    return (leaf for leaf in tensor_leaves(output) if _is_float(leaf))


def tensor_leaves(output: Any) -> list[Tensor]:
    """All tensors in a model's output, in a fixed order.

    Caches for the next call are state, not answer: they count only where nothing else is there.
    """
    return list(_leaves(output, {}, False)) or list(_leaves(output, {}, True))


def _leaves(output: Any, seen: dict[int, Any], states: bool) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
        return
    for value in _children(output, seen, states):
        yield from _leaves(value, seen, states)


def _children(output: Any, seen: dict[int, Any], states: bool) -> list[Any]:
    """What a container or an object holds; an object that was seen holds nothing new."""
    if isinstance(output, dict):  # ModelOutput is one; its order is the field order
        return list(output.values())
    if isinstance(output, (list, tuple)):
        return list(output)
    if isinstance(output, (type, ModuleType, nn.Module)) or id(output) in seen:
        return []  # a model that is handed out with its output is no part of it
    if not states and any(kind.__name__.endswith("Cache") for kind in type(output).__mro__):
        return []  # transformers' caches are plain objects
    seen[id(output)] = output  # held, so that nothing else gets its id meanwhile
    if is_dataclass(output):
        return [getattr(output, field.name) for field in fields(output)]
    return list(getattr(output, "__dict__", {}).values())


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
    top = squared_norm(w - approx.detach().double(), gram, out_gram)
    if top <= 0:
        return 0.0
    bottom = squared_norm(w, gram, out_gram)
    return math.sqrt(top / bottom) if bottom > 0 else math.inf


def squared_norm(matrix: Tensor, gram: Tensor | None, out_gram: Tensor | None = None) -> float:
    """``tr(G M C M^T)``, some rows at a time: these are the largest matrices there are."""
    left = matrix if out_gram is None else out_gram.double() @ matrix
    right = None if gram is None else gram.double()
    parts = zip(left.split(ROWS), matrix.split(ROWS), strict=True)
    return sum(float(((a if right is None else a @ right) * b).sum()) for a, b in parts)


def regularised(gram: Tensor, amount: float = 1e-4) -> Tensor:
    """``C + amount * mean(diag C) * I``: keeps every step of a weighted fit well posed.

    The matrix itself is changed, not only the inverses inside a fit, so that all steps go on
    minimising one stated objective.
    """
    level = float(gram.diagonal().mean()) * amount
    made = gram.clone()  # not a sum with an identity: these are the largest matrices there are
    made.diagonal().add_(max(level, torch.finfo(gram.dtype).tiny))
    return made
