"""Exact structure in a model's own weights: a rewrite that costs no quality."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from structc.families import AbstractFamily
from structc.forms import SPECTRAL, Tile
from structc.passes.capture import record_calls
from structc.passes.fit import one_thread_each
from structc.passes.objective import weight_of
from structc.passes.windows import ahead
from structc.recognition import Recognition, recognize
from structc.records import Captured, LinearSite, Sites

log = logging.getLogger("structc.exact")

LARGEST = 4096 * 4096
"""Elements up to which a weight is looked at: beyond, a look takes minutes."""
WORTH = 0.9
"""Windows through the factors must take less than this share of the convolution's time."""
ROOM = 4.0
"""A structure may cost so many times the products of the dense weight; more cannot be faster."""


def recognised(
    captured: Captured,
    sites: Sites,
    progress: Callable[[str, int, int], None],
    *,
    timed: bool = False,
) -> Mapping[str, Recognition]:
    """The sites whose weight has an exact structure, with the factors.

    rewrite:      linear(x, W, b)  -->  structc::tile(x, factors, program with bias)
                  conv(x, W, b)    -->  the same on every window of x
    Sound because: the factors reproduce the weight within the rounding of its own dtype, which is
        measured on the whole matrix; the rewritten model is verified besides.
    Skips when:   the weight is tied or over 16 million elements; nothing is recognised; the
        structure is complex, or takes more arithmetic than the dense product; a convolution is of
        low rank or the like (only transforms save more than cutting its windows out costs), or was
        timed and is faster as it is.
    """
    jobs = [s for s in (*sites.linear, *sites.convolutions) if "tied" not in s.tags]
    jobs = [s for s in jobs if s.in_features * s.out_features <= LARGEST]

    def one(site: LinearSite) -> Recognition | None:
        found = recognize(weight_of(captured, site))
        return found if found is not None and _usable(found.family, site) else None

    known: dict[str, Recognition] = {}
    with one_thread_each() as pool:
        for at, (site, found) in enumerate(zip(jobs, pool.map(one, jobs), strict=True)):
            progress("recognise", at, len(jobs))
            if found is not None:
                log.info("%s: %s", site.name, found.words)
                known[site.name] = found
    progress("recognise", len(jobs), len(jobs))
    windowed = [s for s in sites.convolutions if s.name in known]
    if windowed and timed:
        _drop_slower(captured, windowed, known)
    return known


def _drop_slower(
    captured: Captured, sites: Sequence[LinearSite], known: dict[str, Recognition]
) -> None:
    """Leave convolutions alone that are faster than their windows through the factors."""
    calls, _ = record_calls(captured.tree, captured.example)
    for site in sites:
        conv, x = captured.tree.get_submodule(site.module), calls[site.module].args[0]
        assert isinstance(conv, (nn.Conv1d, nn.Conv2d)) and site.window is not None
        direct, windowed = ahead(conv, known[site.name].family, site.window, x)
        if windowed > WORTH * direct:
            log.info("%s: %.3g ms as it is, %.3g by windows", site.name, direct, windowed)
            del known[site.name]


def _usable(family: AbstractFamily, site: LinearSite) -> bool:
    tensors = [*family.factors(), *family.buffers()]
    if any(t.is_complex() for t in tensors) or family.to_dense().is_complex():
        return False
    if any(not bool(torch.isfinite(t.to(site.dtype)).all()) for t in tensors):
        return False  # the dtype cannot hold a factor
    form = family.form()
    steps = form.steps if isinstance(form, Tile) else ()
    if site.window is not None and not any(isinstance(s, SPECTRAL) for s in steps):
        return False
    return form.flops <= ROOM * 2 * site.in_features * site.out_features
