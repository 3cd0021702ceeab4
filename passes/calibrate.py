"""Stage 3, calibrate: second moments of every distinct input, streamed over the user's data."""

from __future__ import annotations

import logging
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from structc.errors import CalibrationError
from structc.inputs import canonical, clone_call, describe, run, signature_of, token_mask
from structc.passes.buffers import preserved_buffers
from structc.passes.region import bind_sizes, view_of
from structc.records import Call, Captured, InputStats, LinearSite, Profile, Region, Sites
from structc.workdir import WorkDir

log = logging.getLogger("structc.calibrate")

CONSTANT = 1e-6
"""Variance below this share of the mean square is rounding: the feature does not vary."""
ROWS_AT_ONCE = 1024
"""Rows whose product is taken in float32 before it is added to the float64 sum."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Parts:
    """Calibration calls, split so that no part is used for two purposes.

    Attributes:
        fit: Gram matrices come from these.
        select: the metric that selection sees.
        verify: the verification, and each roll-back that it asks for.
        notes: sentences for the report.
    """

    fit: tuple[Call, ...]
    select: tuple[Call, ...]
    verify: tuple[Call, ...]
    notes: tuple[str, ...] = ()


def split(calls: Sequence[Call]) -> Parts:
    """Keep about a sixth of the data for selection and a sixth for verification.

    With fewer than three batches the batches themselves are cut along their first dimension; a
    single item serves all purposes, and a note says so.
    """
    calls = list(calls)
    while len(calls) < 6:
        halves = [half for call in calls for half in _halves(call)]
        if len(halves) == len(calls):
            break
        calls = halves
    if len(calls) < 3:
        note = "too few calibration items to hold any out: fit and verification share them"
        return Parts(tuple(calls), tuple(calls), tuple(calls), (note,))
    k = max(1, len(calls) // 6)
    order = list(range(len(calls)))
    verify = order[k // 2 :: max(1, len(calls) // k)][:k]  # spread: data often come sorted
    rest = [i for i in order if i not in verify]
    select = rest[k // 2 + 1 :: max(1, len(rest) // k)][:k] or rest[:1]
    fit = [i for i in rest if i not in select]
    parts = [tuple(calls[i] for i in part) for part in (fit, select, verify)]
    return Parts(fit=parts[0], select=parts[1], verify=parts[2])


def _halves(call: Call) -> list[Call]:
    """A batch cut in two along its first dimension, if all tensors share one that allows it."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    sizes = {t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1 or (size := sizes.pop()) < 2:
        return [call]
    cut = (size + 1) // 2
    out = []
    for part in (slice(0, cut), slice(cut, size)):
        kept = [t[part] if isinstance(t, Tensor) and t.dim() else t for t in leaves]
        args, kwargs = pytree.tree_unflatten(kept, spec)
        out.append(Call(args, kwargs))
    return out


def calibrate(
    captured: Captured,
    sites: Sites,
    calls: Sequence[Call],
    *,
    work: WorkDir,
    memory_mb: int,
    progress: Progress = lambda *_: None,
) -> Profile:
    """Accumulate ``sum x x^T`` and ``sum x`` for the input of every group of sites, in float64.

    Products of 1024 rows are taken in the model's precision (at least float32) before they are
    added: their rounding is far below what another sample of data would change.

    Sites that share an input share one matrix. Padding (``attention_mask`` 0) and rows that are not
    finite do not count; an input that no row reaches has no statistics. If all matrices together
    pass ``memory_mb``, the data are read several times, a part of the groups each time, and
    finished matrices wait on disk.

    Errors: :class:`CalibrationError` if a batch does not fit the model, or rows reach an input and
        none of them is finite.
    """
    groups = {site.group: site for site in reversed(sites.linear) if site.window is None}
    calls, dropped = _finite_calls(calls)
    notes = [f"{dropped} calibration batches with NaN or infinity were left out"] if dropped else []
    stats: dict[str, InputStats] = {}
    chunks = list(_chunks(groups, memory_mb))
    with ExitStack() as until:
        spill = None
        if len(chunks) > 1:
            folder = until.enter_context(tempfile.TemporaryDirectory(prefix="structc-"))
            spill = WorkDir(Path(folder), {})
            need = sum(s.in_features**2 for s in groups.values()) * 8 / 1e6
            notes.append(
                f"Gram matrices need {need:.0f} MB, more than {memory_mb} MB: {len(chunks)} passes"
            )
        for at, chunk in enumerate(chunks):
            missing = {g: s for g, s in chunk.items() if not _resume(g, work, stats)}
            if missing:
                made = _one_pass(captured, missing, calls, progress, (at, len(chunks)))
                for group, value in made.items():
                    _keep(group, value, work)
                    stats[group] = value
            if spill is not None:
                for group in chunk.keys() & stats.keys():
                    _keep(group, stats[group], spill)
                    stats[group] = _Spilled(spill, group)  # type: ignore[assignment]
        resolved = _Stats(stats)
        weakref.finalize(resolved, until.pop_all().close)  # what it reads goes with it
    if unseen := len(groups) - len(stats):
        notes.append(f"{unseen} inputs of linear layers were never reached by the calibration data")
    bad = sum(s.dropped for s in stats.values() if isinstance(s, InputStats))
    if bad:
        notes.append(f"{bad} rows of activations were not finite and did not count")
    rows = max((resolved[g].rows for g in resolved), default=0)
    return Profile(resolved, len(calls), rows, tuple(notes))


@dataclass(frozen=True)
class _Spilled:
    store: WorkDir
    group: str


class _Stats(Mapping[str, InputStats]):
    """Moments by group; those on disk are read when asked for."""

    def __init__(self, stats: dict[str, InputStats]) -> None:
        self._stats = stats

    def __getitem__(self, group: str) -> InputStats:
        value = self._stats[group]
        if isinstance(value, _Spilled):
            found: dict[str, InputStats] = {}
            assert _resume(group, value.store, found)
            return found[group]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)


def _chunks(groups: dict[str, LinearSite], memory_mb: int) -> Iterator[dict[str, LinearSite]]:
    chunk: dict[str, LinearSite] = {}
    held = 0.0
    for group, site in groups.items():
        size = site.in_features**2 * 8 / 1e6
        if chunk and held + size > memory_mb:
            yield chunk
            chunk, held = {}, 0.0
        chunk[group] = site
        held += size
    if chunk:
        yield chunk


def _resume(group: str, work: WorkDir, stats: dict[str, InputStats]) -> bool:
    tensors = work.get_tensors(f"gram-{group}")
    if tensors is None or set(tensors) != {"gram", "mean", "counts"}:
        return False
    rows, dropped = (int(v) for v in tensors["counts"])
    stats[group] = InputStats(tensors["gram"], tensors["mean"], rows, dropped)
    return True


def _keep(group: str, value: InputStats, work: WorkDir) -> None:
    counts = torch.tensor([value.rows, value.dropped])
    work.put_tensors(f"gram-{group}", {"gram": value.gram, "mean": value.mean, "counts": counts})


def _finite_calls(calls: Sequence[Call]) -> tuple[list[Call], int]:
    kept = []
    for call in calls:
        leaves = pytree.tree_leaves((call.args, call.kwargs))
        floats = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
        if all(bool(torch.isfinite(t).all()) for t in floats):
            kept.append(call)
    if not kept:
        raise CalibrationError(
            f"calibration: all {len(calls)} batches hold NaN or infinity",
            hint="Clean the data; structc never fits on values that are not finite.",
        )
    return kept, len(calls) - len(kept)


# ---------------------------------------------------------------------------- one pass over data


class Moments:
    """Running sums of the rows of activations, or of gradients."""

    def __init__(self, features: int) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.total = torch.zeros(features, dtype=torch.float64)
        self.rows = 0
        self.dropped = 0

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        if mask is not None:
            if x.dim() > 2 and x.shape[:2] == mask.shape:
                x = x[mask]
            elif x.dim() == 2 and x.shape[0] == mask.numel():
                x = x[mask.reshape(-1)]
        x = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])
        x = x if x.dtype == torch.float64 else x.float()
        finite = torch.isfinite(x).all(1)
        if not bool(finite.all()):
            self.dropped += int((~finite).sum())
            x = x[finite]
        for part in x.split(ROWS_AT_ONCE):
            self.gram += part.mT @ part
            self.total += part.sum(0, dtype=torch.float64)
        self.rows += len(x)

    def done(self, group: str) -> InputStats:
        if self.rows == 0:
            raise CalibrationError(
                f"calibration: no finite activation reached {group} ({self.dropped} were not)",
                hint="The model itself gives NaN or infinity on these data.",
                layer=group,
            )
        return InputStats(self.gram / self.rows, self.total / self.rows, self.rows, self.dropped)


def _one_pass(
    captured: Captured,
    groups: dict[str, LinearSite],
    calls: Sequence[Call],
    progress: Progress,
    part: tuple[int, int],
) -> dict[str, InputStats]:
    sums = {g: Moments(s.in_features) for g, s in groups.items()}
    mask: list[Tensor | None] = [None]
    tree = captured.tree
    handles = []
    for group, site in groups.items():
        if site.module:
            handles.append(
                tree.get_submodule(site.module).register_forward_pre_hook(
                    lambda _m, args, kwargs, s=sums[group]: s.add(
                        args[0] if args else next(iter(kwargs.values())), mask[0]
                    ),
                    with_kwargs=True,
                )
            )
    functional = {g: s for g, s in groups.items() if not s.module}
    for region in captured.regions:
        handles += _watch_region(captured, region, functional, sums, mask)
    try:
        for at, call in enumerate(calls):
            progress("calibrate", at + part[0] * len(calls), part[1] * len(calls))
            token = token_mask(call)
            mask[0] = None if token is None else token.to(torch.bool)
            forward(tree, call)
        progress("calibrate", part[1] * len(calls), part[1] * len(calls))
    finally:
        for handle in handles:
            handle.remove()
    return {group: s.done(group) for group, s in sums.items() if s.rows or s.dropped}


def forward(tree: nn.Module, call: Call) -> None:
    """Run a model on a copy of a call; what it says about itself stays as it was.

    Errors: :class:`CalibrationError` if it fails.
    """
    try:
        with torch.no_grad(), preserved_buffers(tree):
            run(tree, clone_call(call))
    except CalibrationError:
        raise
    except Exception as e:
        raise CalibrationError(
            f"calibration: the model does not run on a batch {describe(call)}: "
            f"{type(e).__name__}: {e}",
            hint=f"Its forward takes {signature_of(tree)}.",
        ) from e


def _watch_region(
    captured: Captured,
    region: Region,
    groups: dict[str, LinearSite],
    sums: dict[str, Moments],
    mask: list[Tensor | None],
) -> list[Any]:
    """Hook a submodule so that weights used without a module see their inputs too.

    The region's graph is interpreted beside the module on the same inputs.
    """
    wanted: dict[str, str] = {}
    for group, site in groups.items():
        for ref in site.nodes:
            if ref.region == region.path:
                wanted[ref.node] = group
    if not wanted:
        return []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            if n.name in wanted:
                args, _ = self.fetch_args_kwargs_from_env(n)
                x = args[1] if "addmm" in str(n.target) else args[0]
                sums[wanted[n.name]].add(x, mask[0])
            return super().run_node(n)

    return [interpreted(captured, region, Watch)]


def interpreted(
    captured: Captured, region: Region, kind: type[torch.fx.Interpreter]
) -> RemovableHandle:
    """Interpret a region's graph beside its module from now on, on the same inputs."""
    owner = captured.tree.get_submodule(region.path)
    view = view_of(region.graph, owner)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = canonical(module, Call(args, kwargs))
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        if bind_sizes(region.guards, leaves, spec) is not None:
            kind(view).run(*clone_call(Call(tuple(leaves), {})).args)  # it may write to them

    return owner.register_forward_pre_hook(before, with_kwargs=True)


def first_items(call: Call, items: int) -> Call:
    """The first items of a batch, if all tensors share their first dimension."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    sizes = {t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()}
    if len(sizes) == 1:
        leaves = [t[:items] if isinstance(t, Tensor) and t.dim() else t for t in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return Call(args, kwargs)


def centred(stats: InputStats) -> InputStats:
    """The moments about the mean: for sites whose bias absorbs ``(W - M) E[x]``."""
    gram = stats.gram - torch.outer(stats.mean, stats.mean)
    constant = gram.diagonal() <= CONSTANT * stats.gram.diagonal()
    gram[constant] = 0.0
    gram[:, constant] = 0.0
    return replace(stats, gram=gram)
