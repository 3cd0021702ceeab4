"""Stage 9, verify: what the product really does, on data that nothing before has used.

The budget is held by rolling back (:mod:`structc.passes.rollback`): while it does not hold, sites
go back to milder forms and to dense, and the model is measured again. The original is always a
plan, so error and metric budgets are always met in the end.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structc.budget import Budget
from structc.errors import ConfigError
from structc.inputs import clone_call, run, token_mask
from structc.metrics import Agreement, default_for
from structc.numerics import output_error, rounding, tolerance
from structc.records import Call, Candidate, Plan, Verification

log = logging.getLogger("structc.verify")


@dataclass(frozen=True)
class Quality:
    """How quality is measured, ready to be asked of any model.

    Attributes:
        name: of the metric, ``""`` if the budget has none.
        value: metric of a model on a part of the data (``"select"`` or ``"verify"``).
        dense: the original's values by part.
    """

    name: str
    value: Callable[[nn.Module, str], float]
    dense: Mapping[str, float]
    notes: tuple[str, ...] = ()


def references(model: nn.Module, calls: Sequence[Call]) -> list[Any]:
    """The outputs of a model on some calls."""
    with torch.no_grad():
        return [run(model, clone_call(c)) for c in calls]


def quality_for(
    budget: Budget, model: nn.Module, select: Sequence[Call], verify: Sequence[Call]
) -> Quality | None:
    """How to measure a budget's metric; None if it has none.

    Errors: :class:`ConfigError` if the user's metric raises, or is not a finite number, on the
        original model.
    """
    if budget.max_drop is None:
        return None
    metric = budget.metric
    if metric is None or isinstance(metric, Agreement):
        return _agreement(metric, model, select, verify)
    parameters = [p for p in _signature(metric) if p.default is p.empty]
    two = len(parameters) >= 2
    notes = (
        ()
        if two
        else ("the metric takes no part of its data: selection and verification saw the same",)
    )

    def value(candidate: nn.Module, part: str) -> float:
        with torch.no_grad():
            result = metric(candidate, part) if two else metric(candidate)
        return float(result)

    parts = ("select", "verify") if two else ("select",)
    dense = {part: _checked(value, model, part) for part in parts}
    dense.setdefault("verify", dense["select"])
    return Quality(getattr(metric, "__name__", "metric"), value, dense, notes)


def _signature(metric: Any) -> Sequence[Any]:
    try:
        return list(inspect.signature(metric).parameters.values())
    except (TypeError, ValueError):
        return []


def _checked(value: Callable[[nn.Module, str], float], model: nn.Module, part: str) -> float:
    try:
        number = value(model, part)
    except Exception as e:
        raise ConfigError(
            f"Budget: the metric fails on the original model: {type(e).__name__}: {e}",
            hint="It is called as metric(model), or metric(model, part) if it takes two arguments.",
        ) from e
    if not math.isfinite(number):
        raise ConfigError(
            f"Budget: the metric of the original model is {number}",
            hint="A finite number is needed, higher is better.",
        )
    return number


def _agreement(
    metric: Agreement | None,
    model: nn.Module,
    select: Sequence[Call],
    verify: Sequence[Call],
) -> Quality:
    outputs = {"select": references(model, select), "verify": references(model, verify)}
    calls = {"select": select, "verify": verify}
    chosen = metric or default_for(outputs["select"][0])
    kept = {
        part: [chosen.summary(o, c) for o, c in zip(outputs[part], calls[part], strict=True)]
        for part in calls
    }
    del outputs

    def value(candidate: nn.Module, part: str) -> float:
        with torch.no_grad():
            ours = [chosen.summary(run(candidate, clone_call(c)), c) for c in calls[part]]
        return chosen.measure(ours, kept[part])

    return Quality(chosen.name, value, {"select": 1.0, "verify": 1.0})


def worst_error(model: nn.Module, calls: Sequence[Call], wanted: Sequence[Any]) -> float:
    """Largest relative output error over some calls, padding left out."""
    worst = 0.0
    with torch.no_grad():
        for call, want in zip(calls, wanted, strict=True):
            got = run(model, clone_call(call))
            worst = max(worst, output_error(got, want, token_mask(call)))
    return worst


def finite(output: Any) -> bool:
    """Whether every floating tensor of an output is finite."""
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    return all(bool(torch.isfinite(t).all()) for t in leaves if t.is_floating_point())


def exact_tolerance(output: Any) -> float:
    """What counts as equal for a model's output."""
    return rounding(output, otherwise=tolerance(torch.float32))


def holds(
    budget: Budget, error: float, allowed: float, metric: float | None, dense: float | None
) -> bool:
    """Whether measured figures are inside a budget.

    Args:
        error: measured relative output error.
        allowed: its limit, for budgets in that currency.
        metric, dense: measured metric of the product and of the original.
    """
    if budget.max_drop is not None:
        assert metric is not None and dense is not None
        return metric >= threshold(dense, float(budget.max_drop))
    return error <= allowed


def threshold(dense: float, max_drop: float) -> float:
    """The least metric inside a relative drop, for metrics of either sign."""
    return dense - max_drop * abs(dense)


# ---------------------------------------------------------------------------- baselines


def caller(f: Callable[..., Any], example: Call) -> Callable[[], object]:
    """A call to time; all versions alike copy their inputs first, for a model may write to them."""

    def call() -> object:
        with torch.no_grad():
            return run(f, clone_call(example))

    return call


def baselines(
    model: nn.Module, example: Call, *, compiled: bool
) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """The dense versions to beat: eager, and ``torch.compile`` with freezing, static and dynamic.

    Returns:
        A timed call for each, and notes on those that could not be built.
    """

    calls = {"eager": caller(model, example)}
    notes: list[str] = []
    if not compiled:
        return calls, notes
    for name, dynamic in (("torch.compile, dynamic", True), ("torch.compile, static", False)):
        try:
            with torch._inductor.config.patch(freezing=True):
                frozen = torch.compile(_forward_of(model), dynamic=dynamic)
                caller(frozen, example)()
            calls[name] = caller(frozen, example)
        except Exception as e:  # Inductor fails in many ways; the baseline is then eager alone
            notes.append(f"{name} could not be measured: {type(e).__name__}")
    return calls, notes


_count = itertools.count()


def _forward_of(model: nn.Module) -> Callable[..., Any]:
    """A function with code of its own: Dynamo keeps what it compiled with the code object.

    So one compilation does not reuse the other's code, no limit on recompilations is met, and what
    was compiled goes when the function goes.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = forward.__code__.replace(co_name=f"forward_{next(_count)}")
    own = types.FunctionType(code, forward.__globals__, closure=forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def unmet_demand(
    budget: Budget, plan: Plan, verification: Verification, table: Mapping[str, Sequence[Candidate]]
) -> str | None:
    """What a budget demands of latency or parameters and quality does not allow, in a sentence."""
    if budget.latency is not None and verification.latency:
        ours = verification.latency["structc"].latency_ms
        best = min(t.latency_ms for n, t in verification.latency.items() if n != "structc")
        if ours > float(budget.latency) * best:
            return (
                f"latency: asked for {budget.latency:.2f} x the best dense version, reached "
                f"{ours / best:.2f} x ({ours:.3g} ms against {best:.3g} ms)"
            )
    if budget.params is not None and table:
        kept = sum(
            c.params
            for site, choice in plan.choices.items()
            for c in table[site]
            if c.family == choice.family and dict(c.hyper) == dict(choice.hyper)
        )
        full = sum(max(c.params for c in row if c.family == "dense") for row in table.values())
        if kept > float(budget.params) * full:
            return (
                f"params: asked for {budget.params:.0%} of the linear layers' parameters, "
                f"reached {kept / full:.0%}"
            )
    return None
