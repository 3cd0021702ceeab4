"""What is known of attention heads, kept in the work folder: an interrupted conversion reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from structc.attention.by_head import method_text
from structc.attention.stats import HeadStats
from structc.attention_records import AttentionSite
from structc.passes.survey_heads import Trials, Verdict, Verdicts
from structc.workdir import WorkDir


def kept_stats(
    work: WorkDir,
    sites: Sequence[AttentionSite],
    survey: Callable[[Sequence[AttentionSite]], Mapping[str, Sequence[HeadStats]]],
) -> dict[str, Sequence[HeadStats]]:
    """Statistics of the heads of each attention that data reach: read, or from ``survey``."""
    kept = {s.name: work.get(f"heads-{s.name}") for s in sites}
    missing = [s for s in sites if kept[s.name] is None]
    made = survey(missing) if missing else {}
    for site in missing:
        kept[site.name] = [_plain(h) for h in made.get(site.name, ())]
        work.put(f"heads-{site.name}", kept[site.name])
    return {name: [_stats_of(row) for row in rows] for name, rows in kept.items() if rows}


def kept_verdicts(
    work: WorkDir, part: str, trials: Trials, judge: Callable[[Trials], Verdicts]
) -> Verdicts:
    """The verdict of each trial that an input of a part of the data was inside of: read, or from
    ``judge``."""
    kept: dict[str, dict[str, Any]] = {n: work.get(f"heads-{part}-{n}") or {} for n in trials}
    missing = {
        name: {m: heads for m, heads in tried.items() if _key(m, heads) not in kept[name]}
        for name, tried in trials.items()
    }
    missing = {name: tried for name, tried in missing.items() if tried}
    made = judge(missing) if missing else {}
    for name, tried in missing.items():
        for method, heads in tried.items():
            one = made.get((name, method))
            kept[name][_key(method, heads)] = one and dataclasses.asdict(one)
        work.put(f"heads-{part}-{name}", kept[name])
    rows = {
        (name, method): kept[name][_key(method, heads)]
        for name, tried in trials.items()
        for method, heads in tried.items()
    }
    return {at: Verdict(**row) for at, row in rows.items() if row is not None}


def _key(method: Any, heads: Sequence[int]) -> str:
    return f"{method_text(method)}:{','.join(map(str, heads))}"


def _plain(stats: HeadStats) -> dict[str, Any]:
    """JSON has no keys but texts: mappings are lists of pairs."""
    found = dataclasses.asdict(stats)
    return {k: list(v.items()) if isinstance(v, Mapping) else v for k, v in found.items()}


def _stats_of(row: Mapping[str, Any]) -> HeadStats:
    return HeadStats(
        **{
            **row,
            "kept": {(int(w), int(s)): mass for (w, s), mass in row["kept"]},
            "blocks": {float(share): mass for share, mass in row["blocks"]},
            "periods": tuple(row["periods"]),
        }
    )
