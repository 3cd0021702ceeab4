"""Stage 5, fit: surviving proposals become candidates with errors; chosen ones become modules."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from structc.families import BY_NAME, AbstractFamily, Dense, LowRank
from structc.families.base import AbstractStructured
from structc.numerics import regularised
from structc.passes.calibrate import centred
from structc.records import Candidate, Captured, Hyper, LinearSite, Price, Profile, Refusal
from structc.workdir import WorkDir

log = logging.getLogger("structc.fit")

Proposal = tuple[str, Hyper, Price]
"""(family, hyper, price) of something that is worth fitting at a site."""


@contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """A pool with a worker for each of PyTorch's threads, and one thread inside each worker.

    Fits are many small decompositions: they scale over sites, hardly inside, and on a busy machine
    threads that wait for each other cost more than the work. The results also do not depend on the
    number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


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


def fit_candidates(
    captured: Captured,
    site: LinearSite,
    proposals: Sequence[Proposal],
    profile: Profile | None,
    work: WorkDir,
) -> tuple[list[Candidate], list[Refusal]]:
    """Errors of all proposals at one site. The dense candidate is always the first.

    Low rank comes from one eigendecomposition for all ranks; other families are fitted, measured
    and let go, since factors are wanted for the chosen ones alone.
    """
    weight, gram = weight_of(captured, site), gram_of(site, profile)
    refusals: list[Refusal] = []
    known = work.get(f"errors-{site.name}") or {}
    errors: dict[str, float] = dict(known)
    _low_rank_errors(weight, gram, proposals, errors)
    candidates = []
    for family, hyper, price in proposals:
        key = _key(family, hyper)
        if family == Dense.name:
            errors[key] = 0.0
        if key not in errors:
            module = fit_one(weight, gram, family, hyper)
            if isinstance(module, Refusal):
                refusals.append(Refusal(site.name, family, module.code, module.reason))
                continue
            errors[key] = module.error(weight, gram)
        form = BY_NAME[family].form_of(
            site.in_features, site.out_features, hyper, bias=False, activation=""
        )
        candidates.append(
            Candidate(site.name, family, hyper, form.params, form.flops, errors[key], price)
        )
    work.put(f"errors-{site.name}", errors)
    return candidates, refusals


def _low_rank_errors(
    weight: Tensor, gram: Tensor | None, proposals: Sequence[Proposal], errors: dict[str, float]
) -> None:
    hypers = [h for f, h, _ in proposals if f == LowRank.name and _key(f, h) not in errors]
    if hypers and bool(torch.isfinite(weight).all()):
        curve = LowRank.curve(weight, gram, [h["rank"] for h in hypers])
        errors.update({_key(LowRank.name, h): e for h, e in zip(hypers, curve, strict=True)})


def fit_one(
    weight: Tensor, gram: Tensor | None, family: str, hyper: Hyper
) -> AbstractFamily | Refusal:
    """Fit one family to one weight."""
    fit: Callable[..., AbstractFamily | Refusal] = BY_NAME[family].fit  # type: ignore[attr-defined]
    return fit(weight, gram, **hyper)


def materialise(
    captured: Captured,
    site: LinearSite,
    family: str,
    hyper: Hyper,
    profile: Profile | None,
) -> AbstractFamily | Refusal:
    """The module that takes a site's place, with its bias.

    A structured module's bias takes up what the approximation does to the mean input,
    ``b' = b + (W - M) E[x]``: exact, and never worse.
    """
    old = None if site.bias is None else operator.attrgetter(site.bias)(captured.tree)
    if family == Dense.name:
        parameter = operator.attrgetter(site.weight)(captured.tree)
        dense = Dense(parameter, transposed=site.transposed)
        if old is not None:
            dense.bias = old if isinstance(old, nn.Parameter) else nn.Parameter(old)
        return dense
    weight = weight_of(captured, site)
    module = fit_one(weight, gram_of(site, profile), family, hyper)
    if isinstance(module, Refusal):
        return Refusal(site.name, family, module.code, module.reason)
    if old is not None:
        new = old.detach().double()
        if profile is not None and site.group in profile.stats:
            gap = weight.double() - module.to_dense().detach().double()
            new = new + gap @ profile.stats[site.group].mean
        module.bias = nn.Parameter(new.to(old.dtype))
    if isinstance(module, AbstractStructured):
        module.transposed = site.transposed
    for parameter in module.parameters():
        parameter.requires_grad_(operator.attrgetter(site.weight)(captured.tree).requires_grad)
    return module.train(False)


def _key(family: str, hyper: Mapping[str, int]) -> str:
    return family + "".join(f" {k}={v}" for k, v in sorted(hyper.items()))
