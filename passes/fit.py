"""Stage 5, fit: surviving proposals become candidates with errors; chosen ones become modules."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

from structc.families import BY_NAME, AbstractFamily, Dense, LowRank
from structc.families.base import AbstractStructured
from structc.numerics import tolerance
from structc.passes.objective import Objective, Objectives
from structc.records import Candidate, Hyper, LinearSite, Price, Refusal
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


@contextmanager
def one_thread() -> Iterator[None]:
    """A fit in the caller's own thread, with the bits that the pool would give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit_candidates(
    objectives: Objectives, site: LinearSite, proposals: Sequence[Proposal], work: WorkDir
) -> tuple[list[Candidate], list[Refusal]]:
    """Errors of all proposals at one site. The dense candidate is always the first.

    Low rank comes from one eigendecomposition for all ranks; other families are fitted, measured
    and let go, since factors are wanted for the chosen ones alone.
    """
    objective = objectives.of(site)
    refusals: list[Refusal] = []
    known = work.get(f"errors-{site.name}") or {}
    errors: dict[str, float] = dict(known)
    _low_rank_errors(objective, proposals, errors)
    candidates = []
    for family, hyper, price in proposals:
        key = _key(family, hyper)
        if family == Dense.name:
            errors[key] = 0.0
        if key not in errors:
            module = objective.fit(family, hyper)
            if isinstance(module, Refusal):
                refusals.append(Refusal(site.name, family, module.code, module.reason))
                continue
            errors[key] = objective.error(module)
        form = BY_NAME[family].form_of(
            site.in_features, site.out_features, hyper, bias=False, activation=""
        )
        candidates.append(
            Candidate(
                site.name,
                family,
                hyper,
                form.params,
                form.flops,
                errors[key],
                price,
                exact=family == Dense.name
                or (objective.is_known(family, hyper) and errors[key] <= tolerance(site.dtype)),
            )
        )
    work.put(f"errors-{site.name}", errors)
    return candidates, refusals


def _low_rank_errors(
    objective: Objective, proposals: Sequence[Proposal], errors: dict[str, float]
) -> None:
    hypers = [
        h
        for f, h, _ in proposals
        if f == LowRank.name and _key(f, h) not in errors and not objective.is_known(f, h)
    ]
    if hypers and bool(torch.isfinite(objective.weight).all()):
        curve = objective.low_rank_errors([h["rank"] for h in hypers])
        errors.update({_key(LowRank.name, h): e for h, e in zip(hypers, curve, strict=True)})


def materialise(
    objectives: Objectives, site: LinearSite, family: str, hyper: Hyper
) -> AbstractFamily | Refusal:
    """The module that takes a site's place, with its bias.

    A structured module's bias takes up what the approximation does to the mean input,
    ``b' = b + (W - M) E[x]``: exact, and never worse.
    """
    tree, profile = objectives.captured.tree, objectives.profile
    old = None if site.bias is None else operator.attrgetter(site.bias)(tree)
    if family == Dense.name:
        parameter = operator.attrgetter(site.weight)(tree)
        dense = Dense(parameter, transposed=site.transposed)
        if old is not None:
            dense.bias = old if isinstance(old, nn.Parameter) else nn.Parameter(old)
        return dense.train(False)
    objective = objectives.of(site)
    module = objective.fit(family, hyper)
    if isinstance(module, Refusal):
        return Refusal(site.name, family, module.code, module.reason)
    if old is not None:
        new = old.detach().double()
        exact = objective.is_known(family, hyper)
        if not exact and profile is not None and site.group in profile.stats:
            gap = objective.weight.double() - module.to_dense().detach().double()
            new = new + gap @ profile.stats[site.group].mean
        module.bias = nn.Parameter(new.to(old.dtype))
    if isinstance(module, AbstractStructured):
        module.transposed = site.transposed
    for parameter in module.parameters():
        parameter.requires_grad_(operator.attrgetter(site.weight)(tree).requires_grad)
    return module.train(False)


def _key(family: str, hyper: Mapping[str, int]) -> str:
    return family + "".join(f" {k}={v}" for k, v in sorted(hyper.items()))
