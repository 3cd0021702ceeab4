"""One site in a paragraph: what was decided, what it gains, what it costs, and why not more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from structc.report.attention import attention_words
from structc.report.words import clean, error, form, ms, number, percent, times

Json = dict[str, Any]
MOST = 6
"""Other forms that are named, the fastest first."""


def explanations(data: Json) -> dict[str, str]:
    """For every site of a report its paragraph, and for what was refused as a whole its reasons."""
    found = {str(site["name"]): "\n".join(_lines(clean(site))) for site in data["sites"]}
    found |= {str(op["name"]): attention_words(clean(op)) for op in data["attention"]}
    attended = {str(op["name"]) for op in data["attention"]}
    others: dict[str, list[str]] = {}
    for refusal in data["refusals"]:
        refusal = clean(refusal)
        name = str(refusal["site"])
        why = f"  refused   {refusal['family'].replace('_', ' ')}: {refusal['reason']}"
        if name in attended:
            found[name] += f"\n{why}"
        elif name and name not in found and refusal["family"] != "capture":
            lines = others.setdefault(name, [f"{name}: stays as it is"])
            lines.append(why)
    return found | {name: "\n".join(lines) for name, lines in others.items()}


def _lines(site: Json) -> Iterator[str]:
    choice = site["choice"] or {"family": "undecided", "hyper": {}}
    yield f"{site['name']}: {form(choice['family'], choice['hyper'])}"
    yield _gain(site)
    if site["rewritten"]:
        kept = f", {percent(site['params_kept'])} of the parameters"
        felt = "" if site["sensitivity"] is None else f", sensitivity {number(site['sensitivity'])}"
        yield f"  cost      output error {error(site)}{felt}{kept}"
    if site["rolled_back"]:
        yield "  verified  went back to this when the whole model was verified"
    others = [c for c in site["candidates"] if c["status"] != "chosen"]
    for at, c in enumerate(sorted(others, key=_speed)[:MOST]):
        label = "why not" if at == 0 else ""
        yield f"  {label:<9} {form(c['family'], c['hyper'])}: {_outcome(c)}"
    if len(others) > MOST:
        yield f"            {len(others) - MOST} more in the report"
    for refusal in site["refusals"][:MOST]:
        yield f"  refused   {refusal['family'].replace('_', ' ')}: {refusal['reason']}"
    if len(site["refusals"]) > MOST:
        yield f"            {len(site['refusals']) - MOST} more in the report"


def _gain(site: Json) -> str:
    if site["dense_ms"] is None or site["chosen_ms"] is None:
        return f"  time      not priced, at {site['rows']:,} rows"
    by = f" by {site['kernel']}" if site["kernel"] else ""
    return (
        f"  time      {ms(site['dense_ms'])} → {ms(site['chosen_ms'])} at {site['rows']:,} rows"
        f"{by}: {times(site['speedup'])} over the best dense kernel"
    )


def _speed(candidate: Mapping[str, Any]) -> float:
    return -(candidate["speedup"] or 0.0)


def _outcome(candidate: Json) -> str:
    facts = []
    if candidate["speedup"] is not None:  # each was timed beside its own run of the dense kernel
        own, dense = ms(candidate["latency_ms"]), ms(candidate["dense_ms"])
        facts.append(f"{dense} → {own}, {times(candidate['speedup'])}")
    if candidate["exact"]:
        facts.append("exact")
    elif candidate["error"] is not None:
        facts.append(f"error {error(candidate)}")
    return f"{', '.join(facts)}: {candidate['why']}" if facts else str(candidate["why"])
