"""What a fit minimises at one site, and the error that its candidates are compared by."""

from __future__ import annotations

import copy
import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from structc import settings
from structc.families import BY_NAME, AbstractFamily, LowRank
from structc.numerics import regularised, weighted_error
from structc.passes.calibrate import centred
from structc.records import Captured, Hyper, LinearSite, Profile, Refusal

KEPT, SHARE = 16, 4
"""Objectives kept, at most; one part in so many of the memory for calibration is theirs."""


class Objective:
    """``|| G^(1/2) (W - M) C^(1/2) ||_F``, with what the data say about inputs and outputs.

    A family that is closed under mixing inside blocks of outputs is fitted to ``S W``, where
    ``S^T S`` are G's diagonal blocks, and mixed back with ``S^-1``: for low rank, whose one block
    is all outputs, that is the exact minimum.

    Args:
        weight: W, ``(m, n)``.
        gram: C, centred if a bias takes the mean; None is the identity.
        out_gram: G, ``(m, m)``, of full rank; None is the identity.
        known: the structure that W has exactly, if it has one.
    """

    def __init__(
        self,
        weight: Tensor,
        gram: Tensor | None,
        out_gram: Tensor | None,
        known: AbstractFamily | None = None,
    ) -> None:
        self.weight, self.gram, self.out_gram, self.known = weight, gram, out_gram, known
        self._whole: tuple[Tensor, Tensor] | None = None

    def fit(self, family: str, hyper: Hyper) -> AbstractFamily | Refusal:
        """Fit one family; what the weight is exactly needs no fit."""
        if self.known is not None and self.is_known(family, hyper):
            return copy.deepcopy(self.known).to(self.weight.dtype)
        kind = BY_NAME[family]
        fit: Callable[..., AbstractFamily | Refusal] = kind.fit  # type: ignore[attr-defined]
        blocks = kind.output_blocks(hyper)
        if self.out_gram is None or not blocks or not bool(torch.isfinite(self.weight).all()):
            return fit(self.weight, self.gram, **hyper)
        if self.weight.shape[0] % blocks:
            return fit(self.weight, self.gram, **hyper)  # refuses, and says why
        root, inverse = self._root(blocks)
        module = fit(_mixed(root, self.weight.double()), self.gram, **hyper)
        if isinstance(module, Refusal):
            return module
        module.mix_outputs(inverse)
        return module.to(self.weight.dtype)

    def is_known(self, family: str, hyper: Hyper) -> bool:
        """Whether these are the family and the hyper-parameters that W has exactly."""
        known = self.known
        return known is not None and (known.name, known.hyper()) == (family, dict(hyper))

    def error(self, module: AbstractFamily) -> float:
        """``||G^(1/2) (W - M) C^(1/2)|| / ||G^(1/2) W C^(1/2)||``, on the factors as stored."""
        return weighted_error(self.weight, module.to_dense(), self.gram, self.out_gram)

    def low_rank_errors(self, ranks: Sequence[int]) -> list[float]:
        """The error of several ranks from one decomposition."""
        weight = self.weight.double()
        if self.out_gram is not None:
            weight = _mixed(self._root(1)[0], weight)
        return LowRank.curve(weight, self.gram, ranks)

    @property
    def root_bytes(self) -> int:
        """What the root and its inverse take, or will."""
        return 0 if self.out_gram is None else 2 * self.out_gram.nbytes

    def _root(self, blocks: int) -> tuple[Tensor, Tensor]:
        """S with ``S^T S = G_bb``, and its inverse, for so many diagonal blocks, ``(b, s, s)``."""
        if blocks == 1 and self._whole is not None:
            return self._whole
        assert self.out_gram is not None
        size = len(self.out_gram) // blocks
        split = self.out_gram.reshape(blocks, size, blocks, size)
        root = torch.linalg.cholesky(split[range(blocks), :, range(blocks)]).mT
        eye = torch.eye(size, dtype=root.dtype).expand_as(root)
        made = root, torch.linalg.solve_triangular(root, eye, upper=True)
        if blocks == 1:  # low rank asks again for each rank; blocks are small and asked for once
            self._whole = made
        return made


class Objectives:
    """The objectives of sites, for several threads at once.

    Those used last are kept, for roots cost a decomposition: a few, and inside a share of the
    memory. Sites of one group share a Gram matrix for as long as any of their objectives lives.
    """

    def __init__(
        self,
        captured: Captured,
        profile: Profile | None,
        known: Mapping[str, AbstractFamily] | None = None,
    ) -> None:
        self.captured, self.profile, self.known = captured, profile, known or {}
        self._limit = settings.current().memory_mb * 1e6 / SHARE
        self._kept: OrderedDict[str, Objective] = OrderedDict()
        self._grams: weakref.WeakValueDictionary[tuple[str, bool], Tensor]
        self._grams = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def of(self, site: LinearSite) -> Objective:
        """The objective of a site."""
        with self._lock:  # also while a Gram matrix is made: others of its group wait for the same
            objective = self._kept.get(site.name) or self._make(site)
            self._kept[site.name] = objective
            self._kept.move_to_end(site.name)
            while len(self._kept) > 1 and (len(self._kept) > KEPT or self._held() > self._limit):
                self._kept.popitem(last=False)
            return objective

    def _make(self, site: LinearSite) -> Objective:
        out_grams: Mapping[str, Tensor] = self.profile.out_grams if self.profile else {}
        key = (site.group, bool(site.bias))
        gram = self._grams.get(key)
        if gram is None:
            gram = gram_of(site, self.profile)
            if gram is not None:
                self._grams[key] = gram
        weight, known = weight_of(self.captured, site), self.known.get(site.name)
        return Objective(weight, gram, out_grams.get(site.name), known)

    def _held(self) -> int:
        grams = {id(o.gram): o.gram.nbytes for o in self._kept.values() if o.gram is not None}
        return sum(grams.values()) + sum(o.root_bytes for o in self._kept.values())


def weight_of(captured: Captured, site: LinearSite) -> Tensor:
    """The site's matrix ``(out_features, in_features)``, in whatever order it is stored."""
    weight: Tensor = operator.attrgetter(site.weight)(captured.tree).detach()
    if site.window is not None:
        return weight.flatten(1)
    return weight.t() if site.transposed else weight


def gram_of(site: LinearSite, profile: Profile | None) -> Tensor | None:
    """The Gram matrix that a fit of this site minimises in: centred if a bias takes the mean."""
    if profile is None or site.group not in profile.stats:
        return None
    stats = profile.stats[site.group]
    return regularised((centred(stats) if site.bias else stats).gram)


def _mixed(root: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(root, weight.unflatten(0, root.shape[:2])).flatten(0, 1)
