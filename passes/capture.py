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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from structc.errors import CaptureError, UnsupportedModel
from structc.inputs import canonical, clone_call, describe, run, signature_of
from structc.passes.agreement import checked
from structc.passes.buffers import preserved_buffers
from structc.passes.clone import clone_tree, set_modes
from structc.passes.filters import long_filters, use_filters
from structc.passes.guards import guards_of
from structc.records import Call, Captured, Refusal, Region

log = logging.getLogger("structc.capture")

TRACED_BATCH = 4


def capture(model: nn.Module, example: Call, *, timed: bool = False) -> Captured:
    """Clone a model and export what can be exported.

    Args:
        model: in any mode; its flags, buffers and hooks are as before afterwards.
        example: a call of it.
        timed: whether long depthwise convolutions may be timed against an FFT, which takes their
            place where it is faster; otherwise operations are counted.

    Errors: :class:`CaptureError` if the model cannot run the example; :class:`UnsupportedModel`
        for kinds of models that have no readable weights.
    """
    check_supported(model)
    tree = clone_tree(model)
    set_modes(tree, False)
    example = canonical(model, example)
    calls, rows = record_calls(tree, example)
    filters = long_filters(tree, calls, timed=timed)
    fast = clone_tree(tree) if filters else tree  # what products are; the tree stays the original
    use_filters(fast, filters)
    region, reason = export_region(fast, "", example)
    if region is not None:
        return Captured(tree, example, (region,), None, rows, (), filters)
    refusals = [Refusal("model", "capture", "EXPORT", f"the whole model does not export: {reason}")]
    regions = list(_partial_regions(fast, calls, refusals))
    analysis = _analysis(fast, example)
    return Captured(tree, example, tuple(regions), analysis, rows, tuple(refusals), filters)


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
        if tensor.device.type != "cpu":
            raise UnsupportedModel(
                f"model: {name} is on {tensor.device}; structc calibrates and times on the CPU",
                hint="Compile a copy on the CPU: model.to('cpu').",
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
    guards = guards_of(program, graph, traced, example)
    graph.meta["out_spec"] = out_spec
    region = Region(path, graph, guards, graph_hash(graph.graph), example)
    return checked(module, region, traced) if check else (region, "")


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


def graph_hash(graph: torch.fx.Graph) -> str:
    """A hash of what a graph computes, without names that differ from process to process."""
    lines = [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


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
