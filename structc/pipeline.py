"""The ten stages, one named line each: ``compile``, ``compile_``, ``inspect`` and ``load``.

This is the only file that knows both the passes and the kernels.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structc import names, ops, settings
from structc.budget import Budget
from structc.codegen import autotune, lower
from structc.codegen.autotune import Request
from structc.compiled import CompiledModel, Handle, handle_of, wrap
from structc.errors import BudgetNotMet, ConfigError, InternalError, Interrupted, StructcError
from structc.families import BY_NAME, FAMILIES, Dense
from structc.forms import PackedDense
from structc.hardware import target
from structc.inputs import calibration_calls, to_call
from structc.passes import trial
from structc.passes.calibrate import Parts, calibrate, split
from structc.passes.capture import capture, check_supported, preserved_buffers
from structc.passes.detect import detect
from structc.passes.fit import fit_candidates
from structc.passes.profile_time import time_shares
from structc.passes.select import Table, dense_of
from structc.records import (
    Call,
    Candidate,
    Captured,
    LinearSite,
    Plan,
    Price,
    Profile,
    Refusal,
    Sites,
    Verification,
)
from structc.report import Report, build_report
from structc.workdir import WorkDir, hash_calls, hash_tensors

log = logging.getLogger("structc")

EFFORTS = ("none", "quick", "full")
WORTH = 0.98
"""A structured form must take less than this share of the best dense time to be fitted at all."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """The resolved options of one conversion."""

    budget: Budget
    config: Mapping[str, Any]
    ignore: tuple[str, ...]
    effort: str
    seed: int
    work_dir: Path | None
    verify: bool
    progress: Progress


@dataclass(eq=False)
class Log:
    """What the stages leave for the report: seconds, refusals and notes."""

    stages: dict[str, float] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start


# ---------------------------------------------------------------------------- public functions


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    calibration: Any = None,
    budget: Budget | None = None,
    config: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    effort: str = "quick",
    seed: int = 0,
    work_dir: str | Path | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> CompiledModel:
    """Rewrite a trained model into a faster one inside a quality budget.

    Args:
        model: any ``nn.Module``; it is left as it is, and shares its untouched parameters.
        example_inputs: of the sizes that matter: a tensor, a tuple, a dict or (tuple, dict). Without
            any, ``model.dummy_inputs`` or ``model.example_input_array`` serve, else the first call.
        calibration: batches in the same forms, a DataLoader, or a function that returns them; the
            last third is kept for selection and verification. None: fits know no data.
        budget: what quality may be spent; ``Budget()`` is the exact tier.
        config: ``{pattern: choice}`` with a family's name, ``{"family": ..., hyper...}`` or None for
            dense; the first matching pattern counts, ``"_default"`` last.
        ignore: patterns of sites that stay as they are.
        effort: ``"none"`` predicts prices and times nothing; ``"quick"``; ``"full"``.
        seed: of everything that is random.
        work_dir: finished work is kept there; the same call continues after an interruption.
        verify: whether the result is measured on held-out data; only tests turn it off.
        progress: called as ``progress(stage, done, total)``.

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
    options = Options(
        budget or Budget(),
        dict(config or {}),
        (ignore,) if isinstance(ignore, str) else tuple(ignore),
        _one_of("effort", effort, EFFORTS),
        seed,
        None if work_dir is None else Path(work_dir),
        verify,
        progress or (lambda *_: None),
    )
    with _public_boundary(options):
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
        example = _example(model, example_inputs)
        if example is None:
            return _deferred(model, options, calibration)
        return _convert(model, example, calibration, options)


def compile_(model: nn.Module, example_inputs: Any = None, **options: Any) -> CompiledModel:
    """Compile in place: the low-memory twin of :func:`compile`. What it replaces is freed.

    Returns:
        The same object, now of a compiled subclass of its class.
    """
    fast = compile(model, example_inputs, **options)
    model.__dict__ = fast.__dict__
    model.__class__ = fast.__class__
    return model  # type: ignore[return-value]


def inspect(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    effort: str = "none",
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """What could change in a model and why not; nothing is fitted.

    Prices are predicted (``effort="none"``) or measured on random factors.
    """
    options = Options(
        Budget(error=1.0),
        {},
        tuple(ignore),
        _one_of("effort", effort, EFFORTS),
        0,
        None,
        False,
        progress or (lambda *_: None),
    )
    with _public_boundary(options):
        check_supported(model)
        example = _example(model, example_inputs)
        if example is None:
            raise ConfigError(
                "inspect: the model brings no example inputs of its own",
                hint="Give example_inputs: a tensor, a tuple, a dict or (tuple, dict).",
            )
        notes = Log()
        with notes.stage("capture"):
            captured = capture(model, example)
        with notes.stage("detect"):
            sites = _keep(detect(captured), options, notes)
        with notes.stage("price"):
            prices = _price(sites, options, notes)
        table = {s.name: _priced_only(s, prices, options, notes) for s in sites.linear}
        return _report(model, sites, {}, None, table, None, None, options, notes)


def reset() -> None:
    """Forget attached kernels and packed weights; references run until something is compiled."""
    ops.detach_all()


# ---------------------------------------------------------------------------- the stages


def _convert(model: nn.Module, example: Call, calibration: Any, options: Options) -> CompiledModel:
    notes, modes = Log(), [(m, m.training) for m in model.modules()]
    if any(training for _, training in modes):
        notes.notes.append("the model was in train mode: it was compiled as in eval mode")
    calls = [] if calibration is None else calibration_calls(calibration)
    parts = split(calls) if calls else Parts((), (example,), (example,))
    notes.notes += parts.notes
    try:
        model.eval()
        with preserved_buffers(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            return _stages(model, example, calls, parts, options, notes)
    finally:
        for module, training in modes:
            module.training = training


def _stages(
    model: nn.Module,
    example: Call,
    calls: list[Call],
    parts: Parts,
    options: Options,
    notes: Log,
) -> CompiledModel:
    budget, stage = options.budget, notes.stage
    with stage("capture"):
        captured = capture(model, example)
    work = WorkDir(options.work_dir, _fingerprint(model, calls, options))
    with stage("detect"):
        sites = _keep(detect(captured), options, notes)
    with stage("calibrate"):
        profile = _calibrate(captured, sites, parts, options, work, notes)
    with stage("price"):
        prices = _price(sites, options, notes)
        shares = time_shares(captured, sites)
    with stage("fit"):
        table = _fit(captured, sites, prices, profile, options, work, notes)
    with stage("select"):
        lab = trial.Lab(model, captured, sites, profile, parts, budget, work)
        kernels = _bind_all(table, sites, notes)
        plan = trial.select_plan(lab, table, options.progress)
    with stage("rewrite"):
        product = lab.product(plan, table)
    with stage("verify"):
        product, plan, verification = trial.verify_product(
            lab, table, plan, product, effort=options.effort, verify=options.verify
        )
    notes.notes += [*plan.notes, *verification.notes]
    notes.refusals += captured.refusals
    report = _report(model, sites, shares, profile, table, plan, verification, options, notes)
    handle = Handle(
        report,
        plan,
        sites,
        captured.regions,
        tuple(k for k in kernels if _in_plan(k, plan)),
        verification.runner,
        {name: _place(product.tree, module) for name, module in product.replaced.items()},
        weakref.ref(model),
    )
    fast = wrap(product.tree, handle)
    _check_demands(fast, plan, verification, table, budget)
    return fast


def _calibrate(
    captured: Captured,
    sites: Sites,
    parts: Parts,
    options: Options,
    work: WorkDir,
    notes: Log,
) -> Profile | None:
    if options.budget.exact:
        return None
    if not parts.fit:
        notes.notes.append("no calibration data: fits minimise the error of weights, not outputs")
        return None
    profile = calibrate(
        captured,
        sites,
        parts.fit,
        work=work,
        memory_mb=settings.current().memory_mb,
        progress=options.progress,
    )
    notes.notes += profile.notes
    return profile


Prices = dict[tuple[str, str, tuple[tuple[str, int], ...]], tuple[Request, Price]]
"""(site, family, hyper) -> what was asked and what it costs."""


def _price(sites: Sites, options: Options, notes: Log) -> Prices:
    """Stage 4: latency depends on shapes, not on values, so it comes before any fit."""
    requests: dict[tuple[str, str, tuple[tuple[str, int], ...]], Request] = {}
    for site in sites.linear:
        for family, hyper in _proposals(site, options):
            form = BY_NAME[family].form_of(
                site.in_features,
                site.out_features,
                hyper,
                bias=site.bias is not None,
                activation=site.activation,
            )
            requests[site.name, family, _frozen(hyper)] = Request(
                form,
                site.rows,
                site.dtype,
                site.bias is not None,
                site.activation,
                site.transposed and isinstance(form, PackedDense),
            )
    found = autotune.price(
        list(requests.values()), effort=options.effort, progress=_named(options.progress, "price")
    )
    prices: Prices = {}
    for (site_name, family, hyper_key), request in requests.items():
        price = found[request]
        if isinstance(price, Refusal):
            notes.refusals.append(replace(price, site=site_name, family=family))
        else:
            prices[site_name, family, hyper_key] = (request, price)
    return prices


def _fit(
    captured: Captured,
    sites: Sites,
    prices: Prices,
    profile: Profile | None,
    options: Options,
    work: WorkDir,
    notes: Log,
) -> Table:
    table: dict[str, list[Candidate]] = {}
    for at, site in enumerate(sites.linear):
        options.progress("fit", at, len(sites.linear))
        proposals = _worth_fitting(site, prices, options, notes)
        found, refusals = fit_candidates(captured, site, proposals, profile, work)
        notes.refusals += refusals
        if found:
            table[site.name] = found
    options.progress("fit", len(sites.linear), len(sites.linear))
    return table


def _worth_fitting(
    site: LinearSite, prices: Prices, options: Options, notes: Log
) -> list[tuple[str, Mapping[str, int], Price]]:
    """The proposals of a site that are faster than dense; the others become refusals."""
    proposals = []
    for (name, family, hyper), (_, price) in prices.items():
        if name != site.name:
            continue
        forced = _forced(site, options)
        if family != Dense.name and not forced and price.latency_ms > WORTH * price.baseline_ms:
            if options.budget.params is None:
                text = ", ".join(f"{k} {v}" for k, v in hyper)
                notes.refusals.append(
                    Refusal(
                        site.name,
                        family,
                        "NOT_FASTER",
                        f"{text}: {price.latency_ms:.3g} ms, the best dense kernel "
                        f"({price.baseline}) takes {price.baseline_ms:.3g} ms",
                    )
                )
                continue
        proposals.append((family, dict(hyper), price))
    return proposals


def _priced_only(site: LinearSite, prices: Prices, options: Options, notes: Log) -> list[Candidate]:
    """Candidates without errors, for ``inspect``."""
    out = []
    for (name, family, hyper), (request, price) in prices.items():
        if name == site.name:
            error = 0.0 if family == Dense.name else float("nan")
            form = request.form
            out.append(Candidate(name, family, dict(hyper), form.params, form.flops, error, price))
    return out


def _bind_all(table: Table, sites: Sites, notes: Log) -> list[dict[str, Any]]:
    """Attach the kernels that the prices promise; a kernel that cannot be built is a refusal.

    A leaf runs without the activation that graphs fuse in: it gets the same kernel for its form.
    """
    by_name = {site.name: site for site in sites.linear}
    bindings: dict[str, dict[str, Any]] = {}
    for name, candidates in table.items():
        site = by_name[name]
        for c in candidates:
            for act in {"", site.activation}:
                form = BY_NAME[c.family].form_of(
                    site.in_features,
                    site.out_features,
                    c.hyper,
                    bias=site.bias is not None,
                    activation=act,
                )
                binding = {
                    "form": str(form),
                    "dtype": str(site.dtype).removeprefix("torch."),
                    "rows": site.rows,
                    "kernel": c.price.kernel,
                    "config": dict(c.price.config),
                    "transposed": site.transposed and c.family == Dense.name,
                    "site": name,
                    "family": c.family,
                    "hyper": dict(c.hyper),
                }
                key = f"{form} {site.dtype} {site.rows} {binding['transposed']}"
                if key in bindings:
                    bindings[f"{key} {name}"] = binding
                    continue
                refusal = lower.bind(
                    form,
                    site.dtype,
                    site.rows,
                    c.price.kernel,
                    c.price.config,
                    transposed=bool(binding["transposed"]),
                )
                if refusal is not None:
                    notes.refusals.append(replace(refusal, site=name, family=c.family))
                bindings[key] = binding
    return list(bindings.values())


def _in_plan(binding: Mapping[str, Any], plan: Plan) -> bool:
    choice = plan.choices.get(binding["site"])
    return (
        choice is not None
        and choice.family == binding["family"]
        and dict(choice.hyper) == binding["hyper"]
    )


# ---------------------------------------------------------------------------- options and sites


def _keep(sites: Sites, options: Options, notes: Log) -> Sites:
    """Leave out what the user wants left alone; patterns that match nothing are errors."""
    every = [s.name for s in sites.linear]
    known = [*every, *(r.site for r in sites.refusals)]
    dropped: set[str] = set()
    for pattern in options.ignore:
        dropped |= set(names.select(pattern, known, "ignore"))
    for pattern in options.config:
        if pattern != "_default":
            names.select(pattern, known, "config")
    for site in sites.linear:
        if site.name in dropped:
            notes.refusals.append(Refusal(site.name, "", "IGNORED", "ignore= names it"))
    return replace(sites, linear=tuple(s for s in sites.linear if s.name not in dropped))


def _forced(site: LinearSite, options: Options) -> tuple[bool, Any] | None:
    """What ``config`` says about a site: (True, choice), or None if it says nothing."""
    for pattern, choice in options.config.items():
        if pattern != "_default" and names.matches(pattern, site.name):
            return True, choice
    if "_default" in options.config:
        return True, options.config["_default"]
    return None


def _proposals(site: LinearSite, options: Options) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Families and hyper-parameters to price at a site; dense is always the first."""
    yield Dense.name, {}
    if options.budget.exact:
        return
    forced = _forced(site, options)
    if forced is not None:
        if forced[1] is not None:
            yield from _forced_proposals(site, forced[1])
        return
    for family in FAMILIES:
        if family is Dense or "tied" in site.tags:
            continue
        for hyper in family.proposals(site.in_features, site.out_features):
            yield family.name, hyper


def _forced_proposals(site: LinearSite, choice: Any) -> Iterator[tuple[str, Mapping[str, int]]]:
    """A choice from ``config``: a family's name, or a dict with ``family`` and hyper-parameters."""
    asked = {"family": choice} if isinstance(choice, str) else dict(choice)
    name = asked.pop("family", None)
    if name not in BY_NAME:
        raise ConfigError(
            f"config: {site.name} asks for family {name!r}",
            hint=f"Known families: {', '.join(BY_NAME)}; None keeps a site dense.",
            layer=site.name,
        )
    if name == Dense.name:
        return
    if asked:
        yield name, {k: int(v) for k, v in asked.items()}
        return
    for hyper in BY_NAME[name].proposals(site.in_features, site.out_features):
        yield name, hyper


def _example(model: nn.Module, example_inputs: Any) -> Call | None:
    if example_inputs is not None:
        return to_call(example_inputs)
    for attribute in ("dummy_inputs", "example_input_array"):
        value = getattr(model, attribute, None)
        if value is not None:
            return to_call(value)
    return None


def _fingerprint(model: nn.Module, calls: list[Call], options: Options) -> dict[str, str]:
    """What finished work depends on. Nothing is hashed when nothing is kept."""
    if options.work_dir is None:
        return {}
    return {
        "model": hash_tensors(dict(model.named_parameters())),
        "data": hash_calls(calls),
        "budget": str(options.budget.to_dict()),
        "config": str(dict(options.config)),
        "ignore": str(options.ignore),
        "effort": options.effort,
        "seed": str(options.seed),
    }


def _check_demands(
    fast: CompiledModel,
    plan: Plan,
    verification: Verification,
    table: Table,
    budget: Budget,
) -> None:
    """Latency and parameter demands that the quality budget does not allow."""
    if budget.latency is not None and verification.latency:
        ours = verification.latency["structc"].latency_ms
        best = min(t.latency_ms for n, t in verification.latency.items() if n != "structc")
        if ours > float(budget.latency) * best:
            raise BudgetNotMet(
                f"latency: asked for {budget.latency:.2f} x the best dense version, reached "
                f"{ours / best:.2f} x ({ours:.3g} ms against {best:.3g} ms) inside the quality budget",
                result=fast,
                hint="The best verified model is in .result; allow more max_drop or error, or less.",
            )
    if budget.params is not None and table:
        kept = sum(_chosen(table[s], c.family, c.hyper).params for s, c in plan.choices.items())
        full = sum(dense_of(c).params for c in table.values())
        if kept > float(budget.params) * full:
            raise BudgetNotMet(
                f"params: asked for {budget.params:.0%} of the linear layers' parameters, reached "
                f"{kept / full:.0%} inside the quality budget",
                result=fast,
                hint="The best verified model is in .result; allow more max_drop or error, or less.",
            )


def _chosen(candidates: Sequence[Candidate], family: str, hyper: Mapping[str, int]) -> Candidate:
    return next(c for c in candidates if c.family == family and dict(c.hyper) == dict(hyper))


def _place(tree: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in tree.named_modules() if m is module)


def _frozen(hyper: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(hyper.items())


def _named(progress: Progress, name: str) -> Progress:
    return lambda _, done, total: progress(name, done, total)


def _one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


# ---------------------------------------------------------------------------- edges


def _deferred(model: nn.Module, options: Options, calibration: Any) -> CompiledModel:
    """A clone that compiles itself at its first call, with the inputs of that call."""
    from structc.passes.clone import clone_tree

    tree = clone_tree(model)
    base = type(tree)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _public_boundary(options):
            fast = _convert(model, Call(args, kwargs), calibration, options)
        self.__dict__ = fast.__dict__
        self.__class__ = fast.__class__
        return self(*args, **kwargs)

    tree.__class__ = type(base)(base.__name__, (base, CompiledModel), {"forward": forward})
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
            "budget": options.budget.to_dict(),
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


@contextmanager
def _public_boundary(options: Options) -> Iterator[None]:
    """Only StructcError and its children leave; a broken promise of ours says so."""
    try:
        yield
    except StructcError:
        raise
    except KeyboardInterrupt:
        if options.work_dir is None:
            raise
        raise Interrupted(
            f"interrupted; finished work is kept in {options.work_dir}",
            hint="Run the same command again to continue.",
        ) from None
    except (AssertionError, KeyError, IndexError, AttributeError, TypeError) as e:
        if sys.exc_info()[2] is None:
            raise
        raise InternalError(
            f"structc broke a promise of its own: {type(e).__name__}: {e}",
            hint="Please report this with the model's class and the full traceback.",
        ) from e
