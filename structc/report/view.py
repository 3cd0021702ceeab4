"""What both renderings show: report data, cleaned, grouped and in the order of reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from structc.report.attention import attention_note, time_left
from structc.report.words import (
    NONE,
    count,
    error,
    form,
    layer_pattern,
    number,
    percent,
    shape_of_name,
    size,
    times,
)

Json = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Linear sites that are the same layer of repeated blocks.

    Attributes:
        name: one text for all their names.
        sites: the sites' data.
        shown: for each site the candidate that stands for it: the chosen one, and in a report of
            ``inspect`` the fastest; None where dense stays.
    """

    name: str
    sites: list[Json]
    shown: list[Json | None]

    @property
    def shape(self) -> str:
        s = self.sites[0]
        return f"{s['in_features']} → {s['out_features']}"

    @property
    def rows(self) -> int:
        return int(self.sites[0]["rows"])

    @property
    def dense_ms(self) -> float | None:
        return _total([s["dense_ms"] for s in self.sites])

    @property
    def chosen_ms(self) -> float | None:
        return _total([_shown_ms(s, c) for s, c in zip(self.sites, self.shown, strict=True)])

    @property
    def speedup(self) -> float | None:
        before, after = self.dense_ms, self.chosen_ms
        return before / after if before and after and after > 0 else None

    @property
    def choices(self) -> list[tuple[str, str, int]]:
        """Family, text with its sizes as ranges, number of sites; the most frequent first."""
        found: dict[str, list[Json]] = {}
        for site, candidate in zip(self.sites, self.shown, strict=True):
            running = candidate or (site["choice"] if site["rewritten"] else _DENSE)
            found.setdefault(running["family"], []).append(running["hyper"])
        texts = [(name, form(name, merged(sizes)), len(sizes)) for name, sizes in found.items()]
        return sorted(texts, key=lambda t: -t[2])

    @property
    def changed(self) -> int:
        return sum(c is not None for c in self.shown)

    @property
    def params_kept(self) -> float | None:
        kept = [c["params_kept"] if c else 1.0 for c in self.shown]
        return _mean(kept)

    @property
    def error_range(self) -> str:
        """Smallest and largest error of what is shown."""
        found = [c for c in self.shown if c]
        known = sorted(c["error"] for c in found if c["error"] is not None and not c["exact"])
        unknown = any(c["error"] is None and not (c["exact"] or c["diverged"]) for c in found)
        texts = ["exact"] if any(c["exact"] for c in found) else []
        texts += [NONE] if texts and unknown else []
        texts += [number(e, 2) for e in [*known[:1], *known[-1:]]]
        texts += [error(c) for c in found if c["diverged"]]
        return "..".join(dict.fromkeys(texts)) or NONE

    @property
    def before(self) -> float:
        """Share of the dense model's time."""
        return sum(max(s["time_share"] or 0.0, 0.0) for s in self.sites)

    @property
    def after(self) -> float:
        """The same after the rewrite, in shares of the dense model's time."""
        return sum(
            max(s["time_share"] or 0.0, 0.0) * _left(s, c)
            for s, c in zip(self.sites, self.shown, strict=True)
        )


_DENSE: Json = {"family": "dense", "hyper": {}}


def merged(hypers: Sequence[Json]) -> Json:
    """One set of hyperparameters for several, with ranges where they differ.

    >>> merged([{"rank": 96}, {"rank": 32}]), merged([{"blocks": 4}, {"blocks": 4}])
    ({'rank': '32..96'}, {'blocks': 4})
    """
    if any(set(h) != set(hypers[0]) for h in hypers):
        return {}
    found = {}
    for key, first in hypers[0].items():
        values = [h[key] for h in hypers]
        numbers = all(isinstance(v, (int, float)) for v in values)
        low, high = (min(values), max(values)) if numbers else (str(first), str(values[-1]))
        found[key] = first if low == high else f"{low}..{high}"
    return found


def _total(values: Sequence[float | None]) -> float | None:
    return None if any(v is None for v in values) else float(sum(v or 0.0 for v in values))


def _mean(values: Sequence[float | None]) -> float | None:
    total = _total(values)
    return None if total is None else total / len(values)


def _shown_ms(site: Json, candidate: Json | None) -> float | None:
    if candidate is not None:
        return candidate["latency_ms"]
    return site["chosen_ms"]


def _left(site: Json, candidate: Json | None) -> float:
    """What remains of a site's time; all of it where no price is known."""
    before, after = site["dense_ms"], _shown_ms(site, candidate)
    return after / before if before and after is not None and before > 0 else 1.0


def choice_text(site: Json, candidate: Json | None) -> str:
    """What runs at a site."""
    if candidate is not None:
        return form(candidate["family"], candidate["hyper"])
    if site["rewritten"]:  # chosen without a candidate that says what it costs
        return form(site["choice"]["family"], site["choice"]["hyper"])
    return "dense"


def groups(data: Json) -> list[Group]:
    """Sites by the layer that they are in repeated blocks, in the model's order."""
    found: dict[tuple[str, int, int, int], list[Json]] = {}
    for site in data["sites"]:
        shape = (site["in_features"], site["out_features"], site["rows"])
        found.setdefault((shape_of_name(site["name"]), *shape), []).append(site)
    inspect = data["kind"] == "inspect"
    return [
        Group(layer_pattern(s["name"] for s in sites), sites, [_stands(s, inspect) for s in sites])
        for sites in found.values()
    ]


def _stands(site: Json, inspect: bool) -> Json | None:
    if inspect:
        return None if site["fastest"] is None else site["candidates"][site["fastest"]]
    if not site["rewritten"]:
        return None
    return next((c for c in site["candidates"] if c["status"] == "chosen"), None)


@dataclass(frozen=True)
class Slice:
    """A part of the model's time: ``before`` and ``after`` are shares of the dense total."""

    name: str
    kind: str
    sites: int
    before: float
    after: float


def slices(data: Json, found: Sequence[Group], most: int = 8) -> list[Slice]:
    """Where the time goes, the largest part first; small groups are put together."""
    linear = [Slice(g.name, "linear", len(g.sites), g.before, g.after) for g in found]
    linear = sorted((s for s in linear if s.before > 0), key=lambda s: -s.before)
    if len(linear) > most:
        rest = linear[most - 1 :]
        merged = Slice(
            f"{len(rest)} smaller groups of layers",
            "linear",
            sum(s.sites for s in rest),
            sum(s.before for s in rest),
            sum(s.after for s in rest),
        )
        linear = [*linear[: most - 1], merged]
    return [*linear, *_elsewhere(data)]


def _elsewhere(data: Json, most: int = 3) -> list[Slice]:
    """Time outside the linear sites: attention, a few more by name, and all the rest as other."""
    found = {k: v for k, v in data["time_elsewhere"].items() if v > 0 and k != "other"}
    order = sorted(found, key=lambda k: (k != "attention", -found[k]))
    left = {"attention": time_left(data)}
    kept = [Slice(k, "elsewhere", 0, found[k], found[k] * left.get(k, 1)) for k in order[:most]]
    other = sum(found[k] for k in order[most:]) + max(data["time_elsewhere"].get("other", 0), 0)
    return [*kept, *([Slice("other", "elsewhere", 0, other, other)] if other > 0 else [])]


def refusal_groups(data: Json) -> list[Json]:
    """Refusals by code, the most frequent first, with the families, sites and one reason."""
    found: dict[str, list[Json]] = {}
    for refusal in data["refusals"]:
        found.setdefault(refusal["code"], []).append(refusal)
    rows = [
        {
            "code": code,
            "count": len(items),
            "sites": len({r["site"] for r in items}),
            "families": sorted({r["family"].replace("_", " ") for r in items}),
            "example": items[0],
            "items": items,
        }
        for code, items in found.items()
    ]
    return sorted(rows, key=lambda r: -r["count"])


_BUDGETS = {
    "metric": ("quality", "{name} may drop by at most {limit}", "it dropped by {value}"),
    "error": ("output error", "at most {limit}", "the largest is {value}"),
    "latency": ("latency", "at most {limit} of the best dense version's", "it is {value}"),
    "params": ("parameters", "at most {limit} of those in linear layers", "{value} are left"),
    "never_slower": (
        "speed",
        "never slower than the best dense version, but for noise of timing",
        "it takes {value} of that time",
    ),
}


def budget_lines(data: Json) -> list[Json]:
    """Each demand as words: ``held`` is true, false, or None where it was not measured."""
    lines = []
    metric = (data["verification"] or {}).get("metric_name", "")
    for row in data["budgets"]:
        known = (row["name"], "at most {limit}", "it is {value}")
        label, demand, outcome = _BUDGETS.get(row["name"], known)
        show = number if row["name"] == "error" else _share
        value = row["value"]
        if row["name"] == "metric" and value is not None and value <= 0:
            outcome, value = "it did not drop", 0.0
        said = outcome.format(value=show(value)) if value is not None else "not measured"
        demand = demand.format(name=metric or "the metric", limit=show(row["limit"]))
        lines.append({"label": label, "demand": demand, "outcome": said, "held": row["held"]})
    return lines


def _share(value: float | None) -> str:
    return percent(value, 1 if value is not None and abs(value) < 0.1 else 0)


def tiles(data: Json) -> list[tuple[str, str, str]]:
    """The key figures: label, value, and what it is measured against."""
    s, v = data["summary"], data["verification"]
    of = f"of {count(s['sites'], 'linear layer')}"
    if data["kind"] == "inspect":
        share = sum(max(x["time_share"] or 0.0, 0.0) for x in data["sites"])
        return [
            ("linear layers", str(s["sites"]), f"{percent(share)} of the time" if share else ""),
            ("faster form exists", str(s["could_be_faster"]), of),
            ("attention ops", str(len(data["attention"])), attention_note(data)),
        ]
    found = [("layers rewritten", str(s["rewritten"]), of)]
    if by_method := sum(op["by_method"] for op in data["attention"]):
        every = sum(op["heads"] for op in data["attention"])
        found.append(("heads by methods", str(by_method), f"of {every} in attention"))
    if s["params_kept"] is not None:
        found.append(("parameters kept", percent(s["params_kept"]), "in linear layers"))
    if s["speedup"] is not None:
        found.insert(0, ("speedup", times(s["speedup"]), f"over {s['best_dense']}, the best dense"))
    if v and s["metric_kept"] is not None:
        found.insert(1, ("quality kept", percent(s["metric_kept"], 1), v["metric_name"]))
    elif v and v["error"] is not None:
        label = "largest relative output error"
        found.insert(1, ("output error", number(v["error"], 2), label))
    return found


def facts(data: Json) -> list[tuple[str, str]]:
    """How the report came about: calibration, verification, machine, versions, resources."""
    t, c, v, p = data["target"], data["calibration"], data["verification"], data["plan"]
    found = [("calibration", "none was used: what was fitted, was fitted to weights alone")]
    if c:
        text = f"{count(c['batches'], 'batch')}, {count(c['rows'], 'row')}, "
        text += count(c["inputs"], "distinct input")
        dropped = f"; {count(c['dropped'], 'row')} left out (not finite)" if c["dropped"] else ""
        found = [("calibration", text + dropped)]
    if p and p["points"]:
        found.append(("selection", f"{count(len(p['points']), 'plan')} compared"))
    if v:
        runner = {"graph": "exported graphs", "inductor": "graphs compiled by Inductor"}
        runs = runner.get(v["runner"], v["runner"])
        found.append(("verification", f"{count(v['calls'], 'held-out call')}; runs as {runs}"))
    isa = f", {', '.join(t['isa'])}" if t["isa"] else ""
    found.append(("machine", f"{t['cpu']}{isa}"))
    found.append(("threads", f"{t['threads']} of {count(t['cores'], 'core')}"))
    versions = {"torch": t["torch"], **data["versions"]}
    found.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    options = [f"{k} {option_text(v)}" for k, v in data["options"].items() if v is not None]
    found.append(("options", "; ".join(options) or NONE))
    peak = data["peak_memory_mb"]
    found.append(("peak memory", NONE if peak is None else f"{number(peak)} MB"))
    if data["packed_bytes"]:
        text = f"{size(data['packed_bytes'])} of derived weight copies beside the parameters"
        found.append(("packed weights", text))
    return found


def option_text(value: Any) -> str:
    """An option as a person would write it.

    >>> option_text({"metric": "spearman", "max_drop": 0.01, "error": None})
    'metric=spearman, max_drop=0.01'
    """
    if isinstance(value, dict):
        pairs = [f"{k}={option_text(v)}" for k, v in value.items() if v is not None]
        return ", ".join(pairs) or "default"
    if isinstance(value, list):
        return ", ".join(option_text(v) for v in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def all_notes(data: Json) -> list[str]:
    """Every stage's sentences, without repeats."""
    parts = [data["calibration"], data["plan"], data["verification"]]
    found = [note for part in parts if part for note in part["notes"]]
    return list(dict.fromkeys([*found, *data["notes"]]))
