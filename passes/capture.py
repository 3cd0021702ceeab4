"""Stage 1, capture: a model and example inputs become a module tree and exported graphs.

The module tree owns everything and always runs. Regions are FX graphs from ``torch.export`` over
the same parameters: of the whole model or, where that fails, of the largest submodules that export.
What cannot be exported stays a plain module, with the reason as a :class:`Refusal`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from structc.errors import CaptureError, UnsupportedModel
from structc.inputs import canonical, clone_call, describe, run, signature_of
from structc.numerics import float_leaves, output_error, tolerance
from structc.passes.clone import clone_tree, set_modes
from structc.passes.shapes import UNBOUNDED, facts_of, holds_at, narrow
from structc.records import Call, Captured, DimGuard, Guards, Refusal, Region

log = logging.getLogger("structc.capture")

TRACED_BATCH = 4


def capture(model: nn.Module, example: Call, *, graphs: bool = True) -> Captured:
    """Clone a model and export what can be exported.

    Args:
        model: in any mode; its flags, buffers and hooks are as before afterwards.
        example: a call of it.
        graphs: whether to export at all.

    Errors: :class:`CaptureError` if the model cannot run the example; :class:`UnsupportedModel`
        for kinds of models that have no readable weights.
    """
    check_supported(model)
    tree = clone_tree(model)
    set_modes(tree, False)
    example = canonical(model, example)
    calls, rows = record_calls(tree, example)
    if not graphs:
        return Captured(tree, example, (), None, rows, ())
    region, reason = export_region(tree, "", example)
    if region is not None:
        return Captured(tree, example, (region,), None, rows, ())
    refusals = [Refusal("model", "capture", "EXPORT", f"the whole model does not export: {reason}")]
    regions = list(_partial_regions(tree, calls, refusals))
    return Captured(tree, example, tuple(regions), _analysis(tree, example), rows, tuple(refusals))


def check_supported(model: object) -> None:
    """Refuse what has no weights to read, before any work."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(
            f"model: expected an nn.Module, got {type(model).__name__}",
            hint="Wrap a function in an nn.Module that owns its weights as parameters.",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModel(
            "model: a ScriptModule has no Python code to rewrite",
            hint="Pass the nn.Module that it was scripted from.",
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UnsupportedModel(
                f"model: {name} is a lazy parameter without a shape",
                hint="Run the model once on real inputs first.",
            )
        if tensor.is_meta:
            raise UnsupportedModel(
                f"model: {name} is on the meta device and has no values",
                hint="Load the weights first; structc.load takes meta models, compile does not.",
            )
        if type(tensor).__name__ == "DTensor":
            raise UnsupportedModel(
                f"model: {name} is a DTensor", hint="Gather the model onto one device first."
            )


def record_calls(tree: nn.Module, example: Call) -> tuple[dict[str, Call], dict[str, int]]:
    """Run the example once; what each submodule is called with, and the rows leaves see.

    Returns:
        The first call of every named submodule, and for each leaf the largest number of rows
        (product of the leading dimensions of its first argument).
    """
    calls: dict[str, Call] = {}
    rows: dict[str, int] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, Call(args, dict(kwargs)))
            if (
                args
                and isinstance(args[0], Tensor)
                and args[0].dim()
                and not any(True for _ in module.children())
            ):
                count = math.prod(args[0].shape[:-1])
                rows[name] = max(rows.get(name, 0), count)

        return record

    for name, module in tree.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):  # they take no hooks
            handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
    try:
        with torch.no_grad(), preserved_buffers(tree):
            run(tree, clone_call(example))
    except Exception as e:
        raise CaptureError(
            f"the model does not run on its example inputs {describe(example)}: "
            f"{type(e).__name__}: {e}",
            hint="Check shapes, dtypes and argument names; structc calls model(*args, **kwargs).",
        ) from e
    finally:
        for handle in handles:
            handle.remove()
    return calls, rows


@contextlib.contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Put buffers back as they were: caches, counters and running statistics move in forward."""
    before = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if buffer.shape != value.shape or not torch.equal(buffer, value):
                    buffer.resize_(value.shape).copy_(value)


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Give a clone's buffers the values that the original's have now."""
    own = dict(source.named_buffers())
    with torch.no_grad():
        for name, buffer in target.named_buffers():
            value = own.get(name)
            if value is not None and not (buffer.shape == value.shape and buffer.equal(value)):
                buffer.resize_(value.shape).copy_(value)


# ---------------------------------------------------------------------------- one export


def export_region(
    module: nn.Module, path: str, example: Call, *, check: bool = True
) -> tuple[Region | None, str]:
    """Export one module with every dimension dynamic, and check the graph at further sizes.

    Args:
        check: off only for a graph whose hash says that it was checked before.

    Returns:
        The region, or None and the reason in one line.
    """
    if reason := _unexportable(example):
        return None, reason
    example = canonical(module, example)
    traced = _for_tracing(example)
    shapes: Any = ShapesCollection()
    for leaf in pytree.tree_leaves((traced.args, traced.kwargs)):
        if isinstance(leaf, Tensor):
            shapes[leaf] = dict.fromkeys(range(leaf.dim()), Dim.AUTO)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused layer op hides the linears
    try:
        with quiet(), preserved_buffers(module), torch.no_grad():
            program = torch.export.export(
                module, traced.args, traced.kwargs, dynamic_shapes=shapes, strict=False
            )
            graph = program.module(check_guards=False)
    except Exception as e:  # torch.export raises a dozen types; the reason goes into the report
        return None, f"{type(e).__name__}: {_first_line(e)}"
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    assert isinstance(graph, torch.fx.GraphModule)
    out_spec = graph._out_spec
    _plain_graph(graph)
    guards = _guards(program, graph, traced, example)
    graph.meta["out_spec"] = out_spec
    region = Region(path, graph, guards, graph_hash(graph.graph), example)
    return _checked(module, region, traced) if check else (region, "")


def _unexportable(example: Call) -> str:
    for leaf in pytree.tree_leaves((example.args, example.kwargs)):
        if leaf is not None and not isinstance(leaf, (Tensor, bool, int, float, str)):
            return f"an input is a {type(leaf).__name__}, which a graph cannot take"
    return ""


def batch_of(example: Call) -> int | None:
    """The first dimension that all tensors of a call share, if they do."""
    leaves = pytree.tree_leaves((example.args, example.kwargs))
    sizes = {t.shape[0] if t.dim() else -1 for t in leaves if isinstance(t, Tensor)}
    return sizes.pop() if len(sizes) == 1 and -1 not in sizes else None


def traced_batch(batch: int) -> int:
    """The batch that export sees: a dimension of 1 would become a constant, and a large one makes
    the checks slow."""
    return min(max(batch, 2), TRACED_BATCH)


def _for_tracing(example: Call) -> Call:
    """The example with its batch repeated or cut to the size that is traced."""
    batch = batch_of(example)
    if not batch:
        return example
    index = torch.arange(traced_batch(batch)) % batch
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.index_select(0, index.to(t.device)), (example.args, example.kwargs)
    )
    return Call(args, kwargs)


def _plain_graph(graph: torch.fx.GraphModule) -> None:
    """Flat tensors in, flat tuple out; no assertions (guards check), no dead nodes."""
    graph.graph.set_codegen(torch.fx.graph.CodeGen())
    for node in reversed(list(graph.graph.nodes)):
        name = str(node.target)
        if node.op == "call_function" and name.startswith(("aten._assert", "aten.sym_constrain")):
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _guards(program: Any, graph: torch.fx.GraphModule, traced: Call, example: Call) -> Guards:
    leaves, spec = pytree.tree_flatten((traced.args, traced.kwargs))
    nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
    ranges: dict[str, tuple[int, int]] = {}
    tied: dict[tuple[int, int], Any] = {}
    renamed: dict[Any, Any] = {}
    symbolic, derived, guards = list[Any](), list[Any](), list[Any]()
    for leaf, node in zip(leaves, nodes, strict=True):
        if not isinstance(leaf, Tensor):
            guards.append(leaf)
            continue
        dims: list[int | str] = []
        for at, size in enumerate(node.meta["val"].shape):
            expr = getattr(getattr(size, "node", None), "expr", None)
            if expr is not None:
                symbolic.append(size)
            if expr is None or not expr.is_Symbol:
                # a derived size (2*s, s+1) is only known to be right where it was seen
                dims.append(int(leaf.shape[at]))
                if expr is not None:
                    derived.append(sympy.Eq(expr, int(leaf.shape[at])))
                continue
            # equal sizes at the same position move together: export does not always say so,
            # and a graph must not run where the model would broadcast or fail
            renamed[expr] = tied.setdefault((at, leaf.shape[at]), expr)
            name = str(renamed[expr])
            bounds = program.range_constraints.get(expr)
            low, high = (
                (2, UNBOUNDED) if bounds is None else (_int(bounds.lower), _int(bounds.upper))
            )
            seen = ranges.get(name, (0, UNBOUNDED))
            ranges[name] = max(seen[0], low), min(seen[1], high)
            dims.append(name)
        guards.append(DimGuard(node.name, tuple(dims), leaf.dtype, leaf.device.type))
    found = Guards(spec, tuple(guards), ranges)
    facts = [f.xreplace(renamed) for f in (*facts_of(symbolic), *derived)]
    home = _sizes(found, pytree.tree_leaves((example.args, example.kwargs)))
    if not holds_at(facts, home):  # a smaller batch went another way: the graph is that one's
        home = _sizes(found, leaves)
    return replace(found, ranges=narrow(facts, ranges, home))


def _sizes(guards: Guards, leaves: list[Any]) -> dict[str, int]:
    """The sizes of symbols in a call."""
    return {
        name: leaf.shape[at]
        for leaf, guard in zip(leaves, guards.leaves, strict=True)
        if isinstance(guard, DimGuard)
        for at, name in enumerate(guard.dims)
        if isinstance(name, str)
    }


def _int(bound: Any) -> int:
    """A bound as a number; export writes infinity as a symbol of its own."""
    return min(int(bound), UNBOUNDED) if getattr(bound, "is_Integer", False) else UNBOUNDED


def graph_hash(graph: torch.fx.Graph) -> str:
    """A hash of what a graph computes, without names that differ from process to process."""
    lines = [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------- checks


def _checked(module: nn.Module, region: Region, traced: Call) -> tuple[Region | None, str]:
    """Run graph and module at the traced sizes, at smaller ones, with each symbol a little off,
    and with each at 1."""
    symbols = dict(region.guards.ranges)
    leaves, spec = pytree.tree_flatten((traced.args, traced.kwargs))
    sizes = {n: _inside(s, symbols[n]) for n, s in _sizes(region.guards, leaves).items()}

    def agrees(wanted: dict[str, int]) -> bool | None:
        resized = resize_inputs(leaves, region.guards, wanted)
        args, kwargs = pytree.tree_unflatten(resized, spec)
        return _agrees(module, region, Call(args, kwargs))

    if not agrees(sizes):
        return None, "the exported graph does not reproduce the module's output"
    if any(agrees(wanted) is False for wanted in _further(sizes, symbols)):
        return _with_ranges(region, {name: (size, size) for name, size in sizes.items()}), ""
    for name, (low, high) in region.guards.ranges.items():
        if low < high:
            one = agrees({**sizes, name: 1}) if low <= 2 else False
            symbols[name] = (1 if one else max(low, 2), high)
    ones = {name: 1 for name, (low, _) in symbols.items() if low == 1}
    if len(ones) > 1 and not agrees({**sizes, **ones}):
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


def _inside(size: int, bounds: tuple[int, int]) -> int:
    return min(max(size, bounds[0]), bounds[1])


def _agrees(module: nn.Module, region: Region, call: Call) -> bool | None:
    """Whether both give the same; None if the module itself cannot run there."""
    from structc.passes.region import call_graph  # here, since region reads capture's graphs

    own = clone_call(call)  # either may write to its inputs
    with torch.no_grad(), preserved_buffers(module):
        try:
            want = run(module, clone_call(call))
        except Exception:
            return None
        try:
            leaves = pytree.tree_leaves((own.args, own.kwargs))
            got = call_graph(region.graph, module, leaves)
        except Exception as e:
            log.info("region %r fails at %s: %s", region.path, describe(call), e)
            return False
    return output_error(got, want) <= _allowed(want)


def _allowed(output: Any) -> float:
    return max((tolerance(t.dtype) for t in float_leaves(output)), default=0.0)


def _with_ranges(region: Region, ranges: dict[str, tuple[int, int]]) -> Region:
    return replace(region, guards=replace(region.guards, ranges=ranges))


def resize_inputs(leaves: list[Any], guards: Guards, sizes: dict[str, int]) -> list[Any]:
    """Inputs of other sizes, made by repeating or cutting the given ones."""
    out = []
    for leaf, guard in zip(leaves, guards.leaves, strict=True):
        if isinstance(guard, DimGuard):
            for at, name in enumerate(guard.dims):
                if isinstance(name, str) and sizes[name] != leaf.shape[at]:
                    index = torch.arange(sizes[name], device=leaf.device) % leaf.shape[at]
                    leaf = leaf.index_select(at, index)
        out.append(leaf)
    return out


# ---------------------------------------------------------------------------- parts of a model


def _partial_regions(
    tree: nn.Module, calls: dict[str, Call], refusals: list[Refusal]
) -> Iterator[Region]:
    """The largest submodules that export, by a walk from the root.

    A class whose export failed is not tried a second time: thirty decoder layers fail alike.
    """
    failed: dict[type, str] = {}

    def visit(module: nn.Module, path: str) -> Iterator[Region]:
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            if not _worth_a_graph(child):
                continue
            if where in calls and type(child) not in failed:
                region, reason = export_region(child, where, calls[where])
                if region is not None:
                    yield region
                    continue
                failed[type(child)] = reason
                text = f"{type(child).__name__} does not export: {reason}"
                refusals.append(Refusal(where, "capture", "EXPORT", text))
            yield from visit(child, where)

    yield from visit(tree, "")


def _worth_a_graph(module: nn.Module) -> bool:
    """More than one leaf, and a matrix among the parameters."""
    return any(True for _ in module.children()) and any(p.dim() == 2 for p in module.parameters())


def _analysis(tree: nn.Module, example: Call) -> Region | None:
    """The whole model's graph without a cache: read for groups and attention, never run."""
    config = getattr(tree, "config", None)
    if "use_cache" not in signature_of(tree).parameters and not hasattr(config, "use_cache"):
        return None
    call = Call(example.args, {**example.kwargs, "use_cache": False})
    return export_region(tree, "", call)[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.export warns about its own internals; nothing of it is for users."""
    loggers = [logging.getLogger(n) for n in ("torch.export", "torch._export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # and a failed export prints its partial graph
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:200]
