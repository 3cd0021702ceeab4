"""Stages 3 and 5 with options, notes and resumable work: what the data say, and what fits lose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from structc import settings
from structc.families import AbstractFamily
from structc.options import Log, Options
from structc.passes.calibrate import Parts, calibrate
from structc.passes.curvature import output_grams
from structc.passes.exact import recognised
from structc.passes.fit import fit_candidates, one_thread_each
from structc.passes.objective import Objectives
from structc.passes.select import Table
from structc.pricing import Prices, worth_fitting
from structc.records import Candidate, Captured, LinearSite, Profile, Refusal, Sites
from structc.workdir import WorkDir

OUT_GRAMS_SHARE = 4
"""One part in so many of the memory for calibration is for what the output feels."""


def calibrated(
    captured: Captured,
    sites: Sites,
    parts: Parts,
    options: Options,
    work: WorkDir,
    notes: Log,
) -> Profile | None:
    """What the data say: Gram matrices of inputs and of what the output feels; None without use."""
    if options.budget.exact:
        return None
    if not parts.fit:
        notes.notes.append("no calibration data: fits minimise the error of weights, not outputs")
        return None
    memory_mb = settings.current().memory_mb
    profile = calibrate(
        captured, sites, parts.fit, work=work, memory_mb=memory_mb, progress=options.progress
    )
    out_grams, more = output_grams(
        captured,
        sites,
        parts.fit,
        work=work,
        memory_mb=memory_mb / OUT_GRAMS_SHARE,
        progress=options.progress,
    )
    profile = replace(profile, out_grams=out_grams, notes=(*profile.notes, *more))
    notes.notes += profile.notes
    return profile


def known_structures(
    captured: Captured, sites: Sites, options: Options, notes: Log
) -> tuple[Sites, dict[str, AbstractFamily]]:
    """The structures that weights have exactly; each is told in the notes.

    Convolutions with one are linear sites from here on, the others stay as they are.
    """
    timed = options.effort in ("quick", "full")
    found = recognised(captured, sites, options.progress, timed=timed)
    for name, recognition in found.items():
        notes.notes.append(f"{name}: {recognition.words}")
    linear = [*sites.linear]
    for site in sites.convolutions:
        if site.name in found:
            linear.append(site)
            continue
        reason = "its kernels are no transform, or it is faster as it is; it is not approximated"
        notes.refusals.append(Refusal(site.name, "recognise", "NO_STRUCTURE", reason))
    families = {name: recognition.family for name, recognition in found.items()}
    return replace(sites, linear=tuple(linear), convolutions=()), families


def filter_notes(captured: Captured) -> list[str]:
    """What became of long depthwise convolutions."""
    return [
        f"{name}: its filters run by FFT: {direct:.3g} -> {by_fft:.3g} ms"
        for name, (direct, by_fft) in captured.filters.items()
    ]


def reached(sites: Sites, profile: Profile | None, notes: Log) -> Sites:
    """Leave out layers that no calibration data reached: nothing says what they may lose."""
    if profile is None:
        return sites
    for site in sites.linear:
        if site.group not in profile.stats and site.window is None:
            reason = f"none of {profile.batches} calibration batches reached it"
            notes.refusals.append(Refusal(site.name, "calibrate", "UNREACHED", reason))
    seen = (s for s in sites.linear if s.group in profile.stats or s.window is not None)
    return replace(sites, linear=tuple(seen))


def fitted(
    objectives: Objectives,
    sites: Sites,
    prices: Prices,
    options: Options,
    work: WorkDir,
    notes: Log,
) -> Table:
    """The candidates of every site, with errors; sites in parallel."""
    known = objectives.known
    jobs = [
        (site, worth_fitting(site, prices, options, notes, known.get(site.name)))
        for site in sites.linear
    ]

    def one(job: tuple[LinearSite, list[Any]]) -> tuple[list[Candidate], list[Refusal]]:
        return fit_candidates(objectives, job[0], job[1], work)

    table: dict[str, list[Candidate]] = {}
    with one_thread_each() as pool:
        for at, (found, refusals) in enumerate(pool.map(one, jobs)):
            options.progress("fit", at, len(jobs))
            notes.refusals += refusals
            if found:
                table[found[0].site] = found
    options.progress("fit", len(jobs), len(jobs))
    return table
