"""An exported graph against its module: at the traced sizes, and at others that it claims."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO

import torch
from torch import nn
from torch.utils import _pytree as pytree

from structc.inputs import clone_call, describe, run
from structc.numerics import output_error, rounding
from structc.passes.buffers import preserved_buffers
from structc.passes.guards import resize_inputs, sizes_of
from structc.passes.region import call_graph
from structc.records import Call, Region

log = logging.getLogger("structc.agreement")

SMALL = 384
"""Sizes above it are halved where a graph is held against its module once more."""


def checked(module: nn.Module, region: Region, traced: Call) -> tuple[Region | None, str]:
    """Run graph and module at the traced sizes, at smaller ones, with each symbol a little off,
    and with each at 1. All but the first are near sizes that are halved until they are small: what
    a graph has wrongly fixed shows at any other size, and a long input is slow."""
    symbols = dict(region.guards.ranges)
    leaves, spec = pytree.tree_flatten((traced.args, traced.kwargs))
    sizes = {n: _inside(s, symbols[n]) for n, s in sizes_of(region.guards, leaves).items()}

    def agrees(wanted: dict[str, int]) -> bool | None:
        resized = resize_inputs(leaves, region.guards, wanted)
        args, kwargs = pytree.tree_unflatten(resized, spec)
        return _agrees(module, region, Call(args, kwargs))

    if not agrees(sizes):
        return None, "the exported graph does not reproduce the module's output"
    small = {n: _small(s, symbols[n]) for n, s in sizes.items()}
    if any(agrees(wanted) is False for wanted in _further(small, symbols)):
        return _with_ranges(region, {name: (size, size) for name, size in sizes.items()}), ""
    for name, (low, high) in region.guards.ranges.items():
        if low < high:
            one = agrees({**small, name: 1}) if low <= 2 else False
            symbols[name] = (1 if one else max(low, 2), high)
    ones = {name: 1 for name, (low, _) in symbols.items() if low == 1}
    if len(ones) > 1 and not agrees({**small, **ones}):
        symbols |= {name: (2, symbols[name][1]) for name in ones if symbols[name][1] > 1}
    return _with_ranges(region, symbols), ""


def _further(
    sizes: dict[str, int], ranges: Mapping[str, tuple[int, int]]
) -> Iterator[dict[str, int]]:
    """Other sizes at which a graph must be right: all smaller, and each one up and down."""
    tried = [sizes]
    for wanted in (
        {n: s // 2 for n, s in sizes.items()},
        {n: s - 1 for n, s in sizes.items()},
        *({**sizes, n: s + step} for n, s in sizes.items() for step in (1, -1)),
    ):
        # at size 1 rules of their own hold: it is tried alone
        allowed = {n: (min(max(2, ranges[n][0]), ranges[n][1]), ranges[n][1]) for n in wanted}
        wanted = {n: _inside(s, allowed[n]) for n, s in wanted.items()}
        if wanted not in tried:
            tried.append(wanted)
            yield wanted


def _small(size: int, bounds: tuple[int, int]) -> int:
    while size > SMALL and size // 2 >= bounds[0]:
        size //= 2
    return size


def _inside(size: int, bounds: tuple[int, int]) -> int:
    return min(max(size, bounds[0]), bounds[1])


def _agrees(module: nn.Module, region: Region, call: Call) -> bool | None:
    """Whether both give the same; None if the module itself cannot run there."""
    own = clone_call(call)  # either may write to its inputs
    with torch.no_grad(), preserved_buffers(module):
        try:
            want = run(module, clone_call(call))
        except Exception:
            return None
        try:
            leaves = pytree.tree_leaves((own.args, own.kwargs))
            with redirect_stderr(StringIO()):  # FX prints what it raises, which is told here
                got = call_graph(region.graph, module, leaves)
        except Exception as e:
            log.info("region %r fails at %s: %s", region.path, describe(call), e)
            return False
    return output_error(got, want) <= rounding(want)


def _with_ranges(region: Region, ranges: dict[str, tuple[int, int]]) -> Region:
    return replace(region, guards=replace(region.guards, ranges=ranges))
