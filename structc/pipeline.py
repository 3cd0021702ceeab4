"""The ten stages, one named line each: ``compile``, ``compile_``, ``inspect`` and ``load``.

This is the only file that knows both the passes and the kernels.
"""

from __future__ import annotations

import logging
import resource
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structc import attend, ops
from structc.boundary import public_boundary
from structc.budget import Budget
from structc.compiled import CompiledModel, Handle, handle_of, wrap
from structc.errors import (
    BudgetNotMet,
    ConfigError,
)
from structc.fitting import calibrated, filter_notes, fitted, known_structures, reached
from structc.hardware import target
from structc.heads import by_head_candidates
from structc.inputs import calibration_calls, clone_call, example_of, required_example
from structc.options import Log, Options, Progress, fingerprint, keep, resolve
from structc.passes import trial
from structc.passes.acceptance import verify_product
from structc.passes.buffers import copy_buffers, preserved_buffers
from structc.passes.calibrate import Parts, split
from structc.passes.capture import capture, check_supported
from structc.passes.chains import Chain
from structc.passes.clone import clone_tree, python_modules, set_modes
from structc.passes.detect import detect
from structc.passes.objective import Objectives
from structc.passes.profile_time import time_shares
from structc.passes.region import without_weights
from structc.passes.rewrite import Product, place_of
from structc.passes.select import Table
from structc.passes.verify import unmet_demand
from structc.pricing import (
    bind_all,
    fast_chains,
    in_plan,
    price,
    price_attention,
    priced_only,
)
from structc.progress import progress_bars
from structc.records import (
    Call,
    Captured,
    Plan,
    Profile,
    Sites,
    Verification,
)
from structc.report import Report, build_report
from structc.trace import dump
from structc.workdir import WorkDir

log = logging.getLogger("structc")

_CHANGED_BY_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


# ---------------------------------------------------------------------------- public functions


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    calibration: Any = None,
    budget: Budget | None = None,
    config: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    effort: str | float = "quick",
    seed: int = 0,
    work_dir: str | Path | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> CompiledModel:
    """Rewrite a trained model into a faster one inside a quality budget.

    Args:
        model: any ``nn.Module``; it is left as it is, and shares its untouched parameters.
        example_inputs: of the sizes that matter: a tensor, a tuple, a dict or (tuple, dict).
            Without any, ``model.dummy_inputs`` or ``model.example_input_array`` serve, else the
            first call.
        calibration: batches in the same forms, a DataLoader, or a function that returns them; a
            third is kept for selection and verification. None: fits know no data.
        budget: what quality may be spent; ``Budget()`` is the exact tier.
        config: ``{pattern: choice}`` with a family's name, ``{"family": ..., hyper...}`` or None
            for dense; the first matching pattern counts, ``"_default"`` last.
        ignore: patterns of sites that stay as they are.
        effort: ``"none"`` predicts prices and times nothing; ``"recorded"`` takes them from the
            tuning database alone; ``"quick"``; ``"full"``; or seconds that the tuner may take.
        seed: of everything that is random.
        work_dir: finished work is kept there; the same call continues after an interruption.
        verify: whether the result is measured on held-out data; only tests turn it off.
        progress: called as ``progress(stage, done, total)``; without it a terminal shows bars.

    Returns:
        A module of the model's own class with ``report``, ``plan`` and ``save``.

    Errors: :class:`ConfigError`, :class:`CalibrationError`, :class:`CaptureError`,
        :class:`UnsupportedModel`, :class:`BudgetNotMet` (carries the best result),
        :class:`Interrupted`.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    >>> fast = compile(model, torch.randn(4, 8), effort="none")
    >>> fast(torch.randn(2, 8)).shape
    torch.Size([2, 8])
    """
    with progress_bars(wanted=progress is None) as bars:
        options = resolve(
            budget=budget,
            config=config,
            ignore=ignore,
            effort=effort,
            seed=seed,
            work_dir=work_dir,
            verify=verify,
            progress=bars if progress is None else progress,
        )
        return _compiled(model, example_inputs, calibration, options)


def _compiled(
    model: nn.Module, example_inputs: Any, calibration: Any, options: Options
) -> CompiledModel:
    """:func:`compile` with its options in order."""
    with public_boundary(options.work_dir):
        check_supported(model)
        known = handle_of(model)
        if known is not None:
            original = known.original() if known.original else None
            if original is None:
                raise ConfigError(
                    "compile: this model is compiled already and its original is gone",
                    hint="Compile the original model again.",
                )
            model = original
        example = example_of(model, example_inputs)
        if example is None:
            return _deferred(model, options, calibration)
        return _convert(model, example, calibration, options)


def compile_(model: nn.Module, example_inputs: Any = None, **options: Any) -> CompiledModel:
    """Compile in place: the low-memory twin of :func:`compile`. What it replaces is freed.

    Returns:
        The same object, now of a compiled subclass of its class.

    Errors: those of :func:`compile`; :class:`ConfigError` too if there are no example inputs, for
        what waits for its first call replaces nothing.
    """
    with public_boundary():
        check_supported(model)
        example = required_example(model, example_inputs, "compile_")
    fast = compile(model, example, **options)  # its own boundary; a misspelt option is a TypeError
    with public_boundary():
        handle = handle_of(fast)
        assert handle is not None
        model.__dict__ = fast.__dict__
        model.__class__ = fast.__class__
        handle.original = None  # it is this one, and compiled now
    return model  # type: ignore[return-value]


def inspect(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    effort: str | float = "none",
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """What could change in a model and why not; nothing is fitted.

    Prices are predicted (``effort="none"``) or measured on random factors.
    """
    with progress_bars(wanted=progress is None) as bars, public_boundary():
        options = resolve(
            budget=Budget(error=1.0),
            ignore=ignore,
            effort=effort,
            verify=False,
            progress=bars if progress is None else progress,
        )
        check_supported(model)
        example = required_example(model, example_inputs, "inspect")
        notes = Log()
        with notes.stage("capture"):
            captured = capture(model, example, timed=options.effort in ("quick", "full"))
            notes.refusals += captured.refusals
            notes.notes += filter_notes(captured)
        with notes.stage("detect"):
            sites = keep(detect(captured), options, notes)
        with notes.stage("recognise"):
            sites, known = known_structures(captured, sites, options, notes)
        with notes.stage("price"):
            prices = price(sites, options, notes, known)
            sites = price_attention(sites, options, notes)
        table = {s.name: priced_only(s, prices, known.get(s.name)) for s in sites.linear}
        return _report(model, sites, {}, None, table, None, None, options, notes)


def reset() -> None:
    """Forget attached kernels and packed weights; references run until something is compiled."""
    ops.detach_all()
    attend.forget()


# ---------------------------------------------------------------------------- the stages


def _convert(model: nn.Module, example: Call, calibration: Any, options: Options) -> CompiledModel:
    notes, modes = Log(), [(m, m.training) for m in python_modules(model)]
    if any(training and isinstance(m, _CHANGED_BY_TRAINING) for m, training in modes):
        notes.notes.append("the model was in train mode: it was compiled as in eval mode")
    calls = [] if calibration is None else calibration_calls(calibration)
    parts = split(calls) if calls else Parts((), (example,), (example,))
    notes.notes += parts.notes
    if not calls and not options.budget.exact:
        notes.notes.append(
            "no calibration data: selection and verification saw the example inputs alone, which "
            "are no independent judge"
        )
    try:
        set_modes(model, False)
        with preserved_buffers(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            return _stages(model, example, calls, parts, options, notes)
    finally:
        for module, training in modes:
            module.training = training


def _stages(
    model: nn.Module, example: Call, calls: list[Call], parts: Parts, options: Options, notes: Log
) -> CompiledModel:
    stage = notes.stage
    with stage("capture"):
        options.progress("capture", 0, 1)
        captured = capture(model, example, timed=options.effort in ("quick", "full"))
        options.progress("capture", 1, 1)
    dump("capture", captured)
    work = WorkDir(options.work_dir, fingerprint(model, [example, *calls], options))
    with stage("detect"):
        sites = keep(detect(captured), options, notes)
    dump("detect", sites)
    with stage("recognise"):
        sites, known = known_structures(captured, sites, options, notes)
    dump("recognise", {name: family.extra_repr() for name, family in known.items()})
    with stage("calibrate"):
        profile = calibrated(captured, sites, parts, options, work, notes)
        sites = reached(sites, profile, notes)
    dump("calibrate", profile)
    with stage("price"):
        prices = price(sites, options, notes, known)
        sites = price_attention(sites, options, notes)
        shares = time_shares(captured, sites)
    dump("price", {" ".join(map(str, k)): p for k, (_, p) in prices.items()})
    with stage("fit"):
        objectives = Objectives(captured, profile, known)
        table = fitted(objectives, sites, prices, options, work, notes)
    dump("fit", table)
    with stage("heads"):
        sites, heads = by_head_candidates(captured, sites, parts, options, work, notes)
    dump("heads", [s.head_rows for s in sites.attention])
    with stage("select"):
        lab = trial.Lab(model, captured, sites, objectives, parts, options.budget, work)
        kernels = bind_all(table, sites, notes)
        table = {**table, **heads}
        plan = trial.select_plan(lab, table, options.progress)
    dump("select", plan)
    with stage("rewrite"):
        product = lab.product(plan, table)
    dump("rewrite", [r.region for r in product.runners])
    chain_kernels: list[dict[str, Any]] = []

    def chains(found: Sequence[Chain]) -> frozenset[str]:
        fast, bindings = fast_chains(found, options, notes)
        chain_kernels.extend(bindings)
        return fast

    with stage("verify"):
        product, plan, verification = verify_product(
            lab,
            table,
            plan,
            product,
            effort="none" if options.effort == "recorded" else options.effort,
            verify=options.verify,
            progress=options.progress,
            fast_chains=chains,
        )
    captured, sites = lab.captured, lab.sites_of(plan)  # without what did not hold
    notes.notes += filter_notes(captured)
    copy_buffers(model, product.tree)  # counters and caches moved while it was measured
    dump("verify", verification)
    notes.notes += [*plan.notes, *verification.notes]
    notes.refusals += captured.refusals
    report = _report(model, sites, shares, profile, table, plan, verification, options, notes)
    dump("report", report.to_dict())
    chosen = [k for k in kernels if in_plan(k, plan)]
    chosen += [k for k in chain_kernels if k["form"] in product.chains]
    handle = _handle(model, captured, sites, product, plan, verification, report, chosen)
    return _met(wrap(product.tree, handle), unmet_demand(options.budget, plan, verification, table))


def _handle(
    model: nn.Module,
    captured: Captured,
    sites: Sites,
    product: Product,
    plan: Plan,
    verification: Verification,
    report: Report,
    kernels: Sequence[dict[str, Any]],
) -> Handle:
    """What a product carries: enough to explain, save and load it."""
    return Handle(
        report,
        replace(plan, words=report.explanations()),
        sites,
        tuple(without_weights(region) for region in captured.regions),
        tuple(kernels),
        verification.runner,
        {name: place_of(product.tree, module) for name, module in product.replaced.items()},
        product.chains,
        tuple(captured.filters),
        weakref.ref(model),
    )


def _met(fast: CompiledModel, unmet: str | None) -> CompiledModel:
    """The product, unless the budget demands what it does not give."""
    if unmet is None:
        return fast
    raise BudgetNotMet(
        f"{unmet} inside the quality budget",
        result=fast,
        hint="The best verified model is in .result; allow more drop or error, or ask less.",
    )


# ---------------------------------------------------------------------------- edges


def _deferred(model: nn.Module, options: Options, calibration: Any) -> CompiledModel:
    """A clone that compiles itself at its first call, with the inputs of that call."""
    tree = clone_tree(model)
    base = type(tree)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with public_boundary(options.work_dir):
            check_supported(model)  # it may have moved since
            fast = _convert(model, clone_call(Call(args, kwargs)), calibration, options)
        self.__dict__ = fast.__dict__
        self.__class__ = fast.__class__
        return self(*args, **kwargs)

    metaclass: Any = type(base)
    tree.__class__ = metaclass(base.__name__, (base, CompiledModel), {"forward": forward})
    return tree  # type: ignore[return-value]


def _report(
    model: nn.Module,
    sites: Sites,
    shares: Mapping[str, float],
    profile: Profile | None,
    table: Table,
    plan: Plan | None,
    verification: Verification | None,
    options: Options,
    notes: Log,
) -> Report:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return build_report(
        model_name=type(model).__name__,
        target=target(),
        options={
            "budget": options.budget.to_dict() if plan is not None else {},
            "effort": options.effort,
            "seed": options.seed,
            "ignore": list(options.ignore),
        },
        sites=sites,
        time_share=shares,
        profile=profile,
        candidates=table,
        refusals=notes.refusals,
        plan=plan,
        verification=verification,
        stages=notes.stages,
        peak_memory_mb=peak,
        packed_bytes=ops.derived_bytes(),
        notes=notes.notes,
    )
