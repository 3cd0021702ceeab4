"""Quality measures without labels: how far a model still does what the original does.

Each is an :class:`Agreement`: it is 1 for equal models and falls from there, so that
``max_drop=0.01`` reads the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structc.errors import ConfigError
from structc.inputs import token_mask
from structc.numerics import float_leaves
from structc.records import Call

POSITIONS = 512
"""Token positions of a batch whose distributions are compared, evenly spread."""


@dataclass(frozen=True)
class Agreement:
    """A measure of agreement between a model and the original on the same inputs.

    Attributes:
        name: for reports.
        summary: what is kept of one output, so that references fit in memory.
        measure: from the summaries of both models over all batches to a number, 1 for equal models.
    """

    name: str
    summary: Callable[[Any, Call], Tensor]
    measure: Callable[[Sequence[Tensor], Sequence[Tensor]], float]

    @property
    def __name__(self) -> str:
        return self.name


def default_for(output: Any) -> Agreement:
    """``kl`` for models that return logits, ``similarity_spearman`` for all others."""
    return kl if _logits(output) is not None else similarity_spearman


def _logits(output: Any) -> Tensor | None:
    value = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    return value if isinstance(value, Tensor) else None


def _embedding(output: Any, call: Call) -> Tensor:
    """One vector an item: the masked mean over tokens of the first floating output."""
    leaf = next(float_leaves(output), torch.zeros(0, 1)).detach().float()
    if leaf.dim() == 3:
        mask = token_mask(call)
        if mask is not None and mask.shape == leaf.shape[:2]:
            weight = mask.to(leaf.dtype).unsqueeze(-1)
            return (leaf * weight).sum(1) / weight.sum(1).clamp_min(1)
        return leaf.mean(1)
    leaf = leaf if leaf.dim() else leaf[None]
    return leaf.reshape(len(leaf), math.prod(leaf.shape[1:]))  # not -1: there may be no items


def _log_probabilities(output: Any, call: Call) -> Tensor:
    """(positions, classes) of the logits, at evenly spread positions that are not padding."""
    logits = _logits(output)
    if logits is None:
        logits = next(float_leaves(output), torch.zeros(0, 1))
    mask = token_mask(call)
    if mask is not None and logits.shape[:2] == mask.shape:
        flat = logits[mask.to(torch.bool)]
    else:
        flat = logits.reshape(-1, logits.shape[-1])
    step = max(1, len(flat) // POSITIONS)
    return F.log_softmax(flat[::step].detach().float(), dim=-1)


def _similarity_spearman(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    from scipy.stats import spearmanr

    _count(theirs, "similarity_spearman")
    a, b = (F.normalize(torch.cat(list(s)), dim=1) for s in (ours, theirs))
    if len(a) < 3:
        return _cosine(ours, theirs)
    upper = torch.triu_indices(len(a), len(a), 1)
    left, right = ((m @ m.T)[upper[0], upper[1]] for m in (a, b))
    value = float(spearmanr(left.numpy(), right.numpy()).statistic)
    return value if math.isfinite(value) else _cosine(ours, theirs)


def _cosine(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    _count(theirs, "cosine")
    return float(F.cosine_similarity(torch.cat(list(ours)), torch.cat(list(theirs))).mean())


def _kl(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    count, total = _count(theirs, "kl"), 0.0
    for a, b in zip(ours, theirs, strict=True):
        total += float(F.kl_div(a, b, log_target=True, reduction="sum"))
    return math.exp(-max(total, 0.0) / count)


def _top1(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    _count(theirs, "top1_agreement")
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, theirs, strict=True)])
    return float(same.float().mean())


def _count(summaries: Sequence[Tensor], name: str) -> int:
    """How much there is to compare; nothing at all is no agreement."""
    count = sum(len(s) for s in summaries)
    if not count:
        raise ConfigError(
            f"{name}: the model's outputs hold nothing that it could compare",
            hint="It needs floating outputs at positions that are not padding; give a metric of "
            "your own, or budget an error.",
        )
    return count


similarity_spearman = Agreement("similarity_spearman", _embedding, _similarity_spearman)
"""Rank correlation of all pairwise cosine similarities of held-out items, before and after."""

cosine = Agreement("cosine", _embedding, _cosine)
"""Mean cosine of an item's embedding with its embedding by the original."""

kl = Agreement("kl", _log_probabilities, _kl)
"""``exp(-KL(original || compiled))``, KL in nats a token: a drop of 1 % is KL of about 0.01."""

top1_agreement = Agreement("top1_agreement", _log_probabilities, _top1)
"""Share of positions where both models put the same class first."""
