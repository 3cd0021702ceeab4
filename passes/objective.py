"""What a fit minimises at one site, and the error that its candidates are compared by."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from structc.families import BY_NAME, AbstractFamily, LowRank
from structc.numerics import regularised, weighted_error
from structc.passes.calibrate import centred
from structc.records import Captured, Hyper, LinearSite, Profile, Refusal


class Objective:
    """``|| G^(1/2) (W - M) C^(1/2) ||_F``, with what the data say about inputs and outputs.

    A family that is closed under mixing inside blocks of outputs is fitted to ``S W``, where
    ``S^T S`` are G's diagonal blocks, and mixed back with ``S^-1``: for low rank, whose one block
    is all outputs, that is the exact minimum.

    Args:
        weight: W, ``(m, n)``.
        gram: C, centred if a bias takes the mean; None is the identity.
        out_gram: G, ``(m, m)``, of full rank; None is the identity.
    """

    def __init__(self, weight: Tensor, gram: Tensor | None, out_gram: Tensor | None) -> None:
        self.weight, self.gram, self.out_gram = weight, gram, out_gram
        self._whole: tuple[Tensor, Tensor] | None = None

    def fit(self, family: str, hyper: Hyper) -> AbstractFamily | Refusal:
        """Fit one family."""
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

    def error(self, module: AbstractFamily) -> float:
        """``||G^(1/2) (W - M) C^(1/2)|| / ||G^(1/2) W C^(1/2)||``, on the factors as stored."""
        return weighted_error(self.weight, module.to_dense(), self.gram, self.out_gram)

    def low_rank_errors(self, ranks: Sequence[int]) -> list[float]:
        """The error of several ranks from one decomposition."""
        weight = self.weight.double()
        if self.out_gram is not None:
            weight = _mixed(self._root(1)[0], weight)
        return LowRank.curve(weight, self.gram, ranks)

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
    """The objective of each site; made once and kept, for roots cost a decomposition."""

    def __init__(self, captured: Captured, profile: Profile | None) -> None:
        self.captured, self.profile = captured, profile
        self._made: dict[str, Objective] = {}

    def of(self, site: LinearSite) -> Objective:
        """The objective of a site."""
        if site.name not in self._made:
            out_grams: Mapping[str, Tensor] = self.profile.out_grams if self.profile else {}
            self._made[site.name] = Objective(
                weight_of(self.captured, site),
                gram_of(site, self.profile),
                out_grams.get(site.name),
            )
        return self._made[site.name]


def weight_of(captured: Captured, site: LinearSite) -> Tensor:
    """The site's matrix ``(out_features, in_features)``, in whatever order it is stored."""
    weight: Tensor = operator.attrgetter(site.weight)(captured.tree).detach()
    return weight.t() if site.transposed else weight


def gram_of(site: LinearSite, profile: Profile | None) -> Tensor | None:
    """The Gram matrix that a fit of this site minimises in: centred if a bias takes the mean."""
    if profile is None or site.group not in profile.stats:
        return None
    stats = profile.stats[site.group]
    return regularised((centred(stats) if site.bias else stats).gram)


def _mixed(root: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(root, weight.unflatten(0, root.shape[:2])).flatten(0, 1)
