"""Stage 3, calibrate: how much the model's output feels each direction of each site's output.

With J the derivative of the model's output by a site's output, ``G = E[J^T J]`` says which errors
of that site matter. Together with the input's Gram matrix C it turns the error of one layer into
one of the whole model, to first order: ``E ||J (W - M) x||^2 = tr(G (W - M) C (W - M)^T)`` if J and
x are independent, the Kronecker-factored Gauss-Newton approximation (Martens and Grosse 2015,
arXiv:1503.05671). J is never formed: for random xi, ``g = J^T xi`` has ``E[g g^T] = J^T J``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structc.inputs import clone_call, run, token_mask
from structc.numerics import float_leaves, regularised
from structc.passes.buffers import preserved_buffers
from structc.passes.calibrate import Moments, first_items
from structc.records import Call, Captured, LinearSite, Sites
from structc.workdir import WorkDir

log = logging.getLogger("structc.curvature")

ROWS_AT_ONCE, ROWS = 1024, 12288
"""Rows of one backward pass, which holds all activations; rows of all of them together."""
DAMPING = 1e-2
"""Directions that the data never showed to matter keep a little weight."""


def output_grams(
    captured: Captured,
    sites: Sites,
    calls: Sequence[Call],
    *,
    work: WorkDir,
    memory_mb: float,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[dict[str, Tensor], list[str]]:
    """``E[g g^T]``, damped, float64 ``(m, m)``, of the sites that are layers, and notes.

    The output's tensors count equally, each relative to its norm; padding does not count. Sites
    whose matrices would together pass ``memory_mb``, the largest first, and weights used without a
    layer have none: their fits weigh all outputs alike.
    """
    chosen, notes = _affordable(sites, memory_mb)
    found: dict[str, Tensor] = {}
    for site in chosen:
        kept = work.get_tensors(f"out-gram-{site.name}")
        if kept is not None and set(kept) == {"gram"}:
            found[site.name] = kept["gram"]
    missing = [site for site in chosen if site.name not in found]
    if missing:
        try:
            made = _measure(captured, missing, calls, progress)
        except Exception as e:  # not differentiable: that costs quality, nothing else
            log.info("no output Gram matrices: %s: %s", type(e).__name__, e)
            notes.append(f"what the output feels could not be measured ({type(e).__name__})")
            made = {}
        for name, gram in made.items():
            work.put_tensors(f"out-gram-{name}", {"gram": gram})
        found.update(made)
    return found, notes


def _affordable(sites: Sites, memory_mb: float) -> tuple[list[LinearSite], list[str]]:
    chosen: list[LinearSite] = []
    held = 0.0
    layers = [s for s in sites.linear if s.module and s.window is None]
    for site in sorted(layers, key=lambda s: s.out_features):
        held += site.out_features**2 * 8 / 1e6
        if held <= memory_mb:
            chosen.append(site)
    if len(chosen) == len(layers):
        return chosen, []
    return chosen, [
        f"{len(layers) - len(chosen)} layers are fitted without regard to what the output feels: "
        f"their matrices would need {held:.0f} MB, {memory_mb:.0f} MB are allowed"
    ]


def _measure(
    captured: Captured,
    sites: Sequence[LinearSite],
    calls: Sequence[Call],
    progress: Callable[[str, int, int], None],
) -> dict[str, Tensor]:
    tree, seen = captured.tree, list[tuple[str, Tensor]]()
    sums = {site.name: Moments(site.out_features) for site in sites}
    handles = [_watch(tree.get_submodule(site.module), site.name, seen) for site in sites]
    parts = _parts(captured, calls)
    try:
        for at, call in enumerate(parts):
            progress("curvature", at, len(parts))
            seen.clear()
            _one_pass(tree, call, seen, sums)
        progress("curvature", len(parts), len(parts))
    finally:
        seen.clear()
        for handle in handles:
            handle.remove()
    grams = {name: s.gram / max(s.rows, 1) for name, s in sums.items()}
    felt = {name: g for name, g in grams.items() if float(g.diagonal().sum()) > 0}
    return {name: regularised(g, DAMPING) for name, g in felt.items()}


def _watch(module: nn.Module, name: str, seen: list[tuple[str, Tensor]]) -> Any:
    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        if not output.requires_grad:  # the first in the graph; parameters may be frozen
            output = output.detach().requires_grad_()
        seen.append((name, output))
        return output.clone()  # what follows may change its input in place

    return module.register_forward_hook(after)


def _one_pass(
    tree: nn.Module, call: Call, seen: list[tuple[str, Tensor]], sums: dict[str, Moments]
) -> None:
    mask = token_mask(call)
    keep = None if mask is None else mask.to(torch.bool)
    with torch.enable_grad(), preserved_buffers(tree):
        output = run(tree, clone_call(call))
        loss = sum(_projection(leaf, keep) for leaf in float_leaves(output) if leaf.requires_grad)
        if not isinstance(loss, Tensor):
            raise RuntimeError("no output depends on a layer in a way that can be differentiated")
        values = [value for _, value in seen]
        gradients = torch.autograd.grad(loss, values, allow_unused=True)
    for (name, _), gradient in zip(seen, gradients, strict=True):
        if gradient is not None:
            sums[name].add(gradient, keep)


def _projection(leaf: Tensor, mask: Tensor | None) -> Tensor:
    """One random direction of an output, relative to the output's norm."""
    if mask is not None and leaf.shape[: mask.dim()] == mask.shape:
        leaf = leaf[mask]
    finite = torch.isfinite(leaf.detach())
    leaf = torch.where(finite, leaf, torch.zeros_like(leaf))  # masked scores are infinite
    norm = leaf.detach().norm().clamp_min(torch.finfo(leaf.dtype).tiny)
    return ((leaf / norm) * torch.randn_like(leaf)).real.sum()


def _parts(captured: Captured, calls: Sequence[Call]) -> list[Call]:
    """The first items of calls spread over the data, so many rows at once and in all."""
    rows = max(captured.leaf_rows.values(), default=1) / max(1, _elements(captured.example))
    cut = [first_items(c, max(1, int(ROWS_AT_ONCE / max(1.0, rows * _item(c))))) for c in calls]
    each = max(1.0, max(rows * _elements(c) for c in cut))
    wanted = min(len(cut), max(1, int(ROWS / each)))
    return [cut[i * len(cut) // wanted] for i in range(wanted)]


def _elements(call: Call) -> int:
    return sum(t.numel() for t in _tensors(call))


def _item(call: Call) -> float:
    return _elements(call) / max([t.shape[0] for t in _tensors(call) if t.dim()] or [1])


def _tensors(call: Call) -> list[Tensor]:
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    return [t for t in leaves if isinstance(t, Tensor)]
