"""The resolved options of one conversion, the log of its stages, and who may be rewritten."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from structc import names
from structc.boundary import check_interrupt
from structc.budget import Budget
from structc.codegen.autotune import EFFORTS
from structc.errors import ConfigError
from structc.families import BY_NAME, FAMILIES, AbstractFamily, Dense
from structc.records import Call, Hyper, LinearSite, Refusal, Sites
from structc.workdir import hash_calls, hash_source, hash_tensors

Progress = Callable[[str, int, int], None]
_USUAL = (1024, 1024)
"""A size at which every family that proposes any hyper-parameters does so."""


@dataclass(frozen=True)
class Options:
    """The resolved options of one conversion."""

    budget: Budget
    config: Mapping[str, Any]
    ignore: tuple[str, ...]
    effort: str
    seconds: float | None
    seed: int
    work_dir: Path | None
    verify: bool
    progress: Progress


def resolve(
    *,
    budget: Any = None,
    config: Any = None,
    ignore: Any = (),
    effort: Any = "quick",
    seed: Any = 0,
    work_dir: Any = None,
    verify: Any = True,
    progress: Any = None,
) -> Options:
    """The options of a call of the public API, each of the type that it has to be.

    Errors: :class:`ConfigError` naming the argument, what it takes and what came.
    """

    def check(name: str, value: Any, good: bool, takes: str) -> None:
        if not good:
            raise ConfigError(f"{name}: expected {takes}, got {value!r:.80}")

    patterns = (ignore,) if isinstance(ignore, str) else () if ignore is None else ignore
    listed = isinstance(patterns, (list, tuple, set, frozenset))
    check("budget", budget, budget is None or isinstance(budget, Budget), "a structc.Budget")
    check(
        "config",
        config,
        config is None
        or (
            isinstance(config, Mapping)
            and all(isinstance(k, str) for k in config)
            and all(v is None or isinstance(v, (str, Mapping)) for v in config.values())
        ),
        "a dict from patterns to a family's name, a dict or None",
    )
    check(
        "ignore",
        ignore,
        listed and all(isinstance(p, str) for p in patterns),
        "a list of patterns",
    )
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    check("seed", seed, whole and 0 <= seed < 2**63, "a whole number from 0 on")
    check("work_dir", work_dir, isinstance(work_dir, (str, PathLike, type(None))), "a folder")
    check("verify", verify, isinstance(verify, bool), "True or False")
    check("progress", progress, progress is None or callable(progress), "a function or None")
    effort, seconds = effort_of(effort)
    return Options(
        budget or Budget(),
        dict(config or {}),
        tuple(patterns),
        effort,
        seconds,
        seed,
        None if work_dir is None else Path(work_dir),
        verify,
        progress or (lambda *_: None),
    )


def effort_of(value: Any) -> tuple[str, float | None]:
    """An effort and a limit in seconds: a number, or a text such as ``"60s"``, is a quick search
    that ends then.

    >>> effort_of("full"), effort_of(60), effort_of("90s")
    (('full', None), ('quick', 60.0), ('quick', 90.0))

    Errors: :class:`ConfigError` for anything else.
    """
    if isinstance(value, str) and value in EFFORTS:
        return value, None
    text = value.removesuffix("s") if isinstance(value, str) else value
    try:
        seconds = -1.0 if isinstance(text, bool) else float(text)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 < seconds < math.inf:
        raise ConfigError(
            f"effort must be one of {', '.join(EFFORTS)}, or seconds, got {value!r}",
            hint="60 or '60s' gives the tuner a minute.",
        )
    return "quick", seconds


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
        check_interrupt()


def keep(sites: Sites, options: Options, notes: Log) -> Sites:
    """Leave out what the user wants left alone; patterns that match nothing are errors."""
    every = [s.name for s in (*sites.linear, *sites.convolutions)]
    known = [*every, *(r.site for r in sites.refusals)]
    attended = [s.name for s in sites.attention]
    dropped: set[str] = set()
    for pattern in options.ignore:
        dropped |= set(names.select(pattern, [*known, *attended], "ignore"))
    if options.budget.exact and any(c not in (None, Dense.name) for c in options.config.values()):
        raise ConfigError(
            "config: structured forms are asked for, the budget takes exact rewrites alone",
            hint="Give a budget that they may spend: Budget(max_drop=0.01) or Budget(error=0.05).",
        )
    for pattern in options.config:
        if pattern != "_default":
            names.select(pattern, known, "config")
    for name in every:
        if name in dropped:
            notes.refusals.append(Refusal(name, "", "IGNORED", "ignore= names it"))
    linear, convolutions = (
        tuple(s for s in found if s.name not in dropped)
        for found in (sites.linear, sites.convolutions)
    )
    attention = tuple(
        replace(s, case=None, refusal=Refusal(s.name, "attention", "IGNORED", "ignore= names it"))
        if s.name in dropped
        else s
        for s in sites.attention
    )
    return replace(sites, linear=linear, convolutions=convolutions, attention=attention)


def forced(site: LinearSite, options: Options) -> tuple[bool, Any] | None:
    """What ``config`` says about a site: (True, choice), or None if it says nothing."""
    for pattern, choice in options.config.items():
        if pattern != "_default" and names.matches(pattern, site.name):
            return True, choice
    if "_default" in options.config:
        return True, options.config["_default"]
    return None


def proposals(
    site: LinearSite, options: Options, known: AbstractFamily | None = None
) -> Iterator[tuple[str, Hyper]]:
    """Families and hyper-parameters to price at a site; dense is always the first.

    Args:
        known: the structure that the weight has exactly; it is proposed in every tier.
    """
    yield Dense.name, {}
    asked = forced(site, options)
    if known is not None and (asked is None or _asks_for(asked[1], known)):
        yield known.name, known.hyper()
        if asked is not None:
            return
    empty = min(site.in_features, site.out_features) < 1
    if options.budget.exact or site.window is not None or empty:
        return
    if asked is not None:
        if asked[1] is not None:
            yield from _forced_proposals(site, asked[1])
        return
    for family in FAMILIES:
        if family is Dense or "tied" in site.tags:
            continue
        for hyper in family.proposals(site.in_features, site.out_features):
            if known is None or (family.name, hyper) != (known.name, known.hyper()):
                yield family.name, hyper


def _asks_for(choice: Any, known: AbstractFamily) -> bool:
    """Whether ``config`` names what the weight is exactly."""
    asked = {"family": choice} if isinstance(choice, str) else dict(choice or {})
    family = asked.pop("family", None)
    return family == known.name and asked in ({}, dict(known.hyper()))


def _forced_proposals(site: LinearSite, choice: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
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
        wanted = BY_NAME[name].hyper_names()
        if set(asked) != set(wanted):
            raise ConfigError(
                f"config: {site.name} asks for {name} with {', '.join(map(str, asked))}",
                hint=f"{name} takes {', '.join(wanted)}, or nothing at all.",
                layer=site.name,
            )
        for key, value in asked.items():
            if isinstance(value, str) and key in BY_NAME[name].hyper_words():
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"config: {site.name} asks for {name} with {key} {value!r}",
                    hint="Hyper-parameters are whole numbers or words, "
                    "{'family': 'low_rank', 'rank': 64}.",
                    layer=site.name,
                )
        yield str(name), {str(key): value for key, value in asked.items()}
        return
    offered = list(BY_NAME[name].proposals(site.in_features, site.out_features))
    names_needed = not BY_NAME[name].proposals(*_USUAL) and BY_NAME[name].hyper_names()
    if not offered and names_needed:
        raise ConfigError(
            f"config: {site.name} asks for {name}, which proposes no sizes of its own",
            hint=f"Say which: {name} takes {', '.join(BY_NAME[name].hyper_names())}.",
            layer=site.name,
        )
    if not offered and not BY_NAME[name].hyper_names():
        offered = [{}]
    for hyper in offered:
        yield name, hyper


def fingerprint(model: nn.Module, calls: list[Call], options: Options) -> dict[str, str]:
    """What finished work depends on. Nothing is hashed when nothing is kept."""
    if options.work_dir is None:
        return {}
    return {
        "model": hash_tensors({**dict(model.named_parameters()), **dict(model.named_buffers())}),
        "data": hash_calls(calls),
        "metric": hash_source(options.budget.metric),
        "budget": str(options.budget.to_dict()),
        "config": str(dict(options.config)),
        "ignore": str(options.ignore),
        "effort": options.effort,
        "seed": str(options.seed),
    }
