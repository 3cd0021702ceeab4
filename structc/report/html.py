"""The report as one HTML page: nothing is loaded from elsewhere, no script, every name escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from structc.report import attention as attention
from structc.report import plots as plots
from structc.report import view as view
from structc.report import words as words

Json = dict[str, Any]

_OPEN = 12
"""Up to this many sites are shown without a click."""

GLOSSARY = {
    "Site": "One linear layer of the model (y = x W + b): the unit that is kept or rewritten.",
    "Best dense": "The fastest way known to run the original weights on this machine. Speedups are "
    "against it, not against plain eager PyTorch.",
    "Dense": "The layer as it is. Dense is a candidate at every site.",
    "Heads": "One attention's heads may be computed by different methods: each takes the fastest "
    "whose output on calibration data, confirmed on other data, is off by no more than the share "
    "that was chosen for its layer. Heads that recall (induction heads) stay exact.",
    "Low rank": "The weight as a product of two thin matrices. Rank r costs r × (in + out) "
    "multiplications a row instead of in × out.",
    "Monarch": "The weight as two block-diagonal factors with a shuffle between them. Cut into "
    "in-blocks × out-blocks tiles, the matrix has the given rank in each tile.",
    "Candidate": "One structured form with its sizes, timed at this model's number of rows and "
    "fitted to the layer's weight.",
    "Relative output error": "The layer's output error divided by the size of its output, for "
    "inputs distributed like the calibration data; directions that the model's output feels more "
    "count more. 0.1 means 10 %.",
    "Sensitivity": "How strongly an error of this layer shows in the model's output: model error "
    "divided by layer error, measured by replacing this layer alone.",
    "Rows": "How many vectors the layer transforms in one call, such as batch × length.",
    "Lower quartile": "A quarter of the timed rounds were faster. It is steadier than the mean on "
    "a machine that does other work too.",
    "Spread": "Distance from the lower to the upper quartile, relative to the lower one. "
    "Differences smaller than it are noise.",
    "Budget": "What the rewrite may cost, checked on data that neither the fits nor the selection "
    "have seen.",
    "Rolled back": "Chosen first, then returned to a milder form or to dense, because the whole "
    "model broke its budget.",
    "Exact, approximate": "Exact rewrites change outputs by rounding only. Approximate ones spend "
    "a part of the budget.",
    "Packed weights": "Copies of weights in the memory order that a kernel wants. They are "
    "derived, not saved with the model.",
}


def render(data: Json) -> str:
    """The page for a report's data."""
    data = words.clean(data)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        ms=words.ms,
        number=words.number,
        percent=words.percent,
        times=words.times,
        error=words.error,
        option=view.option_text,
    )
    return environment.get_template("report.html.j2").render(_context(data))


def frame(page: str) -> str:
    """The page in a frame of its own, so that a notebook's style and the report's do not mix."""
    style = "width:100%;height:80vh;min-height:480px;border:1px solid #8884;border-radius:8px"
    return f'<iframe sandbox style="{style}" srcdoc="{escape(page, quote=True)}"></iframe>'


def _context(data: Json) -> Json:
    groups = view.groups(data)
    parts = view.slices(data, groups)
    panels, left_out = plots.panels(groups)
    chart, by_metric = "", False
    if data["plan"]:
        name = (data["verification"] or {}).get("metric_name", "")
        chart, by_metric = plots.pareto(data["plan"], name)
    fastest = max((g.speedup or 0 for g in groups), default=0)
    every = [c["speedup"] or 0 for s in data["sites"] for c in s["candidates"]]
    return {
        "r": data,
        "inspect": data["kind"] == "inspect",
        "tiles": view.tiles(data),
        "budgets": view.budget_lines(data),
        "time": _time(data, parts),
        "latency_plot": Markup(plots.latency_bars(data["latency"]) if data["latency"] else ""),
        "groups": [_group(g, max(fastest, *every, 1.0)) for g in groups],
        "open_groups": len(data["sites"]) <= _OPEN,
        "panels": [{**p, "svg": Markup(p["svg"])} for p in panels],
        "left_out": left_out,
        "families": _legend(data),
        "pareto": Markup(chart),
        "by_metric": by_metric,
        "attention": [
            {
                **a,
                "spelled": attention.spelling(a),
                "mask_text": attention.mask(a),
                "head_text": attention.heads(a),
                "computed_by": attention.attention_kernel(a),
            }
            for a in attention.attention_groups(data)
        ],
        "attention_note": attention.attention_note(data),
        "head_grid": attention.head_grid(data),
        "head_legend": attention.head_legend(data),
        "refusals": view.refusal_groups(data),
        "stages": _stages(data),
        "facts": view.facts(data),
        "notes": view.all_notes(data),
        "glossary": GLOSSARY,
    }


def _time(data: Json, parts: Sequence[view.Slice]) -> Json | None:
    if not parts:
        return None
    summary = data["summary"]
    before, after = sum(p.before for p in parts), sum(p.after for p in parts)
    dense = summary["best_dense_ms"]
    measured = summary["latency_ms"] / dense if dense and summary["latency_ms"] else None
    classes = plots.slice_classes(parts)
    return {
        "before": Markup(plots.stacked(parts, after=False)),
        "after": Markup(plots.stacked(parts, after=True, marker=measured)),
        "rows": [{"part": p, "css": css} for p, css in zip(parts, classes, strict=True)],
        "before_share": before,
        "after_share": after,
        "dense_ms": dense,
        "after_ms": None if dense is None else dense * after,
        "measured_ms": summary["latency_ms"],
    }


def _group(group: view.Group, fastest: float) -> Json:
    return {
        "name": group.name,
        "shape": group.shape,
        "rows": f"{group.rows:,}",
        "sites": [_site(s, c, fastest) for s, c in zip(group.sites, group.shown, strict=True)],
        "choices": [
            {"text": text, "count": n, "css": plots.family_class(family)}
            for family, text, n in group.choices
        ],
        "changed": group.changed,
        "dense_ms": group.dense_ms,
        "chosen_ms": group.chosen_ms,
        "speedup": group.speedup,
        "meter": _meter(group.speedup, fastest),
        "params_kept": group.params_kept,
        "errors": group.error_range.replace("..", " to "),
        "sensitivity": _range([s["sensitivity"] for s in group.sites]),
    }


def _range(values: Sequence[float | None]) -> str:
    known = sorted(v for v in values if v is not None)
    if not known:
        return words.NONE
    return " to ".join(dict.fromkeys(words.number(v, 2) for v in (known[0], known[-1])))


def _meter(speedup: float | None, fastest: float) -> float:
    """Percent of the largest gain; dense has none."""
    gain, most = (speedup or 1.0) - 1.0, max(fastest - 1.0, 1e-9)
    return round(100 * min(max(gain / most, 0.0), 1.0), 1)


def _site(site: Json, shown: Json | None, fastest: float) -> Json:
    now = shown["latency_ms"] if shown else site["chosen_ms"]
    running = shown or (site["choice"] if site["rewritten"] else None) or {"family": "dense"}
    return {
        **site,
        "text": view.choice_text(site, shown),
        "css": plots.family_class(running["family"]),
        "now_ms": now,
        "now_speedup": shown["speedup"] if shown else site["speedup"],
        "now_kernel": shown["kernel"] if shown else site["kernel"],
        "now_params": shown["params_kept"] if shown else site["params_kept"],
        "now_error": _error(site, shown),
        "meter": _meter(shown["speedup"] if shown else site["speedup"], fastest),
        "forms": [
            {
                **c,
                "text": words.form(c["family"], c["hyper"]),
                "css": plots.family_class(c["family"]),
                "meter": _meter(c["speedup"], fastest),
            }
            for c in site["candidates"]
        ],
    }


def _error(site: Json, shown: Json | None) -> str:
    if shown is None and not site["rewritten"]:
        return words.NONE
    return words.error(shown or site)


def _legend(data: Json) -> list[Json]:
    names = dict.fromkeys(c["family"] for s in data["sites"] for c in s["candidates"])
    return [
        {"text": name.replace("_", " "), "css": plots.family_class(name)}
        for name in names
        if name != "dense"
    ]


def _stages(data: Json) -> list[Json]:
    longest = max((s["seconds"] or 0 for s in data["stages"]), default=0) or 1.0
    return [
        {**s, "meter": round(100 * max(s["seconds"] or 0, 0) / longest, 1)} for s in data["stages"]
    ]
