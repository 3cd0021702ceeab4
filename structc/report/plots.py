"""The report's plots as inline SVG: colours come from the page's style, so they follow its theme.

Bars have percent coordinates and no view box, so that they stretch while their text does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from structc.report.view import Group, Slice
from structc.report.words import form, ms, number, percent, times

Json = dict[str, Any]

FAMILIES = ("low_rank", "monarch", "blast", "block_diagonal", "butterfly", "kronecker", "btt")
_MOST_PANELS = 12


def family_class(family: str) -> str:
    """The style class of a family: the same colour in every report; dense is grey."""
    if family == "dense":
        return "f-dense"
    known = family in FAMILIES
    return f"f{FAMILIES.index(family) if known else len(FAMILIES)}"


def stacked(parts: Sequence[Slice], after: bool, marker: float | None = None) -> str:
    """One horizontal bar of parts; ``marker`` is where a measurement says that it ends."""
    scale = max(sum(p.before for p in parts), sum(p.after for p in parts), marker or 0, 1e-9)
    shapes, start, linear = [], 0.0, 0
    for part in parts:
        value = part.after if after else part.before
        name = f"t{linear}" if part.kind == "linear" else _elsewhere(part.name)
        linear += part.kind == "linear"
        left, width = 100 * start / scale, 100 * max(value, 0) / scale
        title = escape(f"{part.name}: {percent(value, 1)}")
        shapes.append(
            f'<g><title>{title}</title><rect class="slice {name}" x="{left:.3f}%" y="0" '
            f'width="{width:.3f}%" height="34"/>'
        )
        if width >= 5:
            css = f"on-slice {name}-ink" + (" small" if width < 10 else "")
            middle = f"{left + width / 2:.3f}%"
            shapes.append(f'<text class="{css}" x="{middle}" y="22">{percent(value)}</text>')
        shapes.append("</g>")
        start += max(value, 0)
    if marker is not None:
        at = f"{100 * marker / scale:.3f}%"
        shapes.append(f'<line class="measured" x1="{at}" x2="{at}" y1="-4" y2="38"/>')
    word = "after" if after else "before"
    return (
        f'<svg class="stacked" role="img" aria-label="Share of time {word}" width="100%" '
        f'height="34">{"".join(shapes)}</svg>'
    )


def _elsewhere(name: str) -> str:
    return "t-attention" if name == "attention" else "t-other"


def slice_classes(parts: Sequence[Slice]) -> list[str]:
    """For each part the class that colours it, for a legend."""
    linear = iter(range(len(parts)))
    return [f"t{next(linear)}" if p.kind == "linear" else _elsewhere(p.name) for p in parts]


def latency_bars(rows: Sequence[Json]) -> str:
    """Lower quartile as a bar, the span up to the upper quartile as a whisker, median as a dot."""
    tops = [(r["latency_ms"] or 0) * (1 + max(r["spread"] or 0, 0)) for r in rows]
    scale = max(*tops, 1e-9, *((r["median_ms"] or 0) for r in rows)) / 0.82  # room for the text
    shapes, line = [], 30
    for i, (row, top) in enumerate(zip(rows, tops, strict=True)):
        y, low = i * line, row["latency_ms"] or 0
        kind = "ours" if row["ours"] else "best" if row["best_dense"] else "dense"
        end, far = 100 * low / scale, 100 * max(top, row["median_ms"] or 0) / scale
        mid, dot = y + 11, 100 * (row["median_ms"] or low) / scale
        shapes.append(
            f'<rect class="bar {kind}" x="0" y="{y}" width="{end:.2f}%" height="22" rx="3"/>'
            f'<line class="whisker" x1="{end:.2f}%" x2="{far:.2f}%" y1="{mid}" y2="{mid}"/>'
            f'<circle class="median" cx="{dot:.2f}%" cy="{mid}" r="3"/>'
            f'<text class="bar-text" x="{far:.2f}%" dx="10" y="{y + 15}">{ms(row["latency_ms"])}'
            "</text>"
        )
    label = escape(", ".join(f"{r['name']} {ms(r['latency_ms'])}" for r in rows))
    height = line * len(rows)
    return (
        f'<svg class="bars" role="img" aria-label="{label}" width="100%" height="{height}">'
        f"{''.join(shapes)}</svg>"
    )


@dataclass(frozen=True)
class Axis:
    """A scale from data to pixels.

    Attributes:
        low, high: of the data.
        start, end: pixels of ``low`` and ``high``.
        log: whether equal ratios are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; values outside stick to the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values, a handful.

        >>> Axis(0.013, 0.7, 0, 1, log=True).ticks()
        [0.02, 0.05, 0.1, 0.2, 0.5]
        """
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            every = max(1, (last - first) // 5)
            powers = range(first, last + 1, every)
            found = [float(f"{s}e{p}") for p in powers for s in steps]
        else:
            rough = (self.high - self.low) / 6
            unit = 10 ** math.floor(math.log10(rough))
            step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= rough)
            first = math.ceil(self.low / step - 1e-9)
            last = math.floor(self.high / step + 1e-9)
            found = [round(i * step, 12) for i in range(first, last + 1)]
        return [t for t in found if self.low <= t <= self.high]


def _spread_out(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """Ends of an axis: a little air around the values, never empty."""
    low, high = min(values), max(values)
    if log:
        return (low / 1.25, high * 1.25)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (low - air, high + air)


def _grid(x: Axis, y: Axis, x_text: Any, y_text: Any) -> str:
    shapes = []
    for t in y.ticks():
        at = y.at(t)
        shapes.append(
            f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick end" x="{x.start - 6:.1f}" y="{at + 3.5:.1f}">{y_text(t)}</text>'
        )
    for t in x.ticks():
        at = x.at(t)
        shapes.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.end:.1f}" y2="{y.start:.1f}"/>'
            f'<text class="tick" x="{at:.1f}" y="{y.start + 15:.1f}">{x_text(t)}</text>'
        )
    return "".join(shapes)


def panels(groups: Sequence[Group]) -> tuple[list[Json], int]:
    """Error against speed, one panel for each group, all on the same axes.

    Returns:
        Panels with ``name`` and ``svg``; and how many candidates have no place for want of a
        finite error.
    """
    points = [_points(g) for g in groups]
    left_out = sum(_unplaced(g) for g in groups)
    shown = [(g, p) for g, p in zip(groups, points, strict=True) if p]
    shown = sorted(shown, key=lambda gp: -(gp[0].before or gp[0].dense_ms or 0))[:_MOST_PANELS]
    every = [p for _, found in shown for p in found]
    if not every:
        return [], left_out
    errors = [e for _, e, _ in every if e > 0] or [1e-3]
    x = Axis(*_spread_out([1.0, *(s for s, _, _ in every)]), 46, 312)
    y = Axis(*_spread_out([max(min(errors), 1e-9), max(errors)], log=True), 176, 12, log=True)
    return [{"name": g.name, "svg": _panel(g.name, p, x, y)} for g, p in shown], left_out


def _points(group: Group) -> list[tuple[float, float, Json]]:
    return [
        (c["speedup"], max(c["error"], 0.0), {**c, "site": s["name"]})
        for s in group.sites
        for c in s["candidates"]
        if c["family"] != "dense" and c["error"] is not None and c["speedup"] is not None
    ]


def _unplaced(group: Group) -> int:
    every = [c for s in group.sites for c in s["candidates"] if c["family"] != "dense"]
    return len(every) - len(_points(group))


def _panel(name: str, points: Sequence[tuple[float, float, Json]], x: Axis, y: Axis) -> str:
    dense = x.at(1.0)
    shapes = [
        _grid(x, y, lambda t: f"{t:g}x", lambda t: f"{t:g}"),
        f'<line class="one" x1="{dense:.1f}" x2="{dense:.1f}" y1="{y.end}" y2="{y.start}"/>',
    ]
    for speedup, err, c in sorted(points, key=lambda p: p[2]["status"] == "chosen"):
        title = f"{c['site']}: {form(c['family'], c['hyper'])}, {times(speedup)}, error "
        chosen = c["status"] == "chosen"
        words = {"chosen": ", chosen", "rolled_back": ", rolled back"}.get(c["status"], "")
        kind = family_class(c["family"])
        px, py = x.at(speedup), y.at(err) if err > 0 else y.start
        shapes.append(
            f'<g class="{kind}{" chosen" if chosen else ""}">'
            f"<title>{escape(title + number(err, 2) + words)}</title>"
            f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="{5 if chosen else 3}"/></g>'
        )
    label = escape(f"Error against speedup of the candidates for {name}")
    axis = (
        f'<text class="axis" x="{(x.start + x.end) / 2:.0f}" y="208">speedup over dense</text>'
        f'<text class="axis" transform="translate(9 {(y.start + y.end) / 2:.0f}) rotate(-90)">'
        "output error (log)</text>"
    )
    return (
        f'<svg class="panel" role="img" aria-label="{label}" viewBox="0 0 324 214">'
        f"{''.join(shapes)}{axis}</svg>"
    )


def pareto(plan: Json, metric_name: str) -> tuple[str, bool]:
    """Plans that selection compared: latency against the loss of quality, or the predicted error.

    Returns:
        The plot, empty if there are fewer than two plans, and whether it shows the loss.
    """
    points = [p for p in plan["points"] if p["latency_ms"] is not None]
    measured = [p for p in points if p["loss"] is not None]
    by_metric = len(measured) >= 2
    key = "loss" if by_metric else "predicted_error"
    shown = measured if by_metric else [p for p in points if p[key] is not None]
    if len(shown) < 2:
        return "", by_metric
    shown = sorted(shown, key=lambda p: (p["latency_ms"], p[key]))
    x = Axis(*_spread_out([p["latency_ms"] for p in shown]), 64, 700)
    y = Axis(*_spread_out([p[key] for p in shown]), 236, 14)
    line = " ".join(f"{x.at(p['latency_ms']):.1f},{y.at(p[key]):.1f}" for p in shown)
    what = f"loss of {escape(metric_name or 'quality')}" if by_metric else "predicted error"
    shapes = [_grid(x, y, lambda t: f"{t:g}", lambda t: f"{t:.4g}")]
    shapes.append(f'<polyline class="curve" points="{line}"/>')
    for p in shown:
        px, py = x.at(p["latency_ms"]), y.at(p[key])
        title = f"{ms(p['latency_ms'])}, {what} {number(p[key])}"
        kind = "plan chosen" if p["chosen"] else "plan"
        shapes.append(
            f'<g class="{kind}"><title>{escape(title)}</title>'
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{7 if p["chosen"] else 4}"/></g>'
        )
        if p["chosen"]:
            shapes.append(
                f'<text class="chosen-text" x="{px + 12:.1f}" y="{py + 16:.1f}">chosen</text>'
            )
    shapes.append(
        '<text class="axis" x="382" y="272">predicted time of the linear layers, ms</text>'
        f'<text class="axis" transform="translate(12 125) rotate(-90)">{what}</text>'
    )
    label = f"Predicted time against {what} of the plans"
    return (
        f'<svg class="pareto" role="img" aria-label="{label}" viewBox="0 0 716 280">'
        f"{''.join(shapes)}</svg>"
    ), by_metric
