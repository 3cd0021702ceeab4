"""The report in a terminal: about one screen, as wide as the terminal, names never as markup."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from structc.report import attention as attention
from structc.report import view as view
from structc.report.words import NONE, clean, count, ms, number, percent, times

Json = dict[str, Any]

_MOST_GROUPS = 24
_MOST_REFUSALS = 6
_ASCII = str.maketrans("→–─█░…·", ">--#.~|")


def to_text(data: Json, width: int | None = None, encoding: str | None = None) -> str:
    """The report without colours.

    Args:
        data: of the report.
        width: columns; None asks the terminal.
        encoding: of what the text is meant for; None asks standard output.
    """
    columns = width or min(max(shutil.get_terminal_size((100, 24)).columns, 60), 140)
    out = io.StringIO()
    console = Console(file=out, width=columns, color_system=None, legacy_windows=False)
    console.print(ReportText(data))
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    if encoding.lower().replace("-", "") != "utf8":
        text = text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    return text


def shorten(name: str, width: int) -> str:
    """Cut the front of a name: the end says which layer it is.

    >>> shorten("encoder.layer.0.output.dense", 15), shorten("head", 15)
    ('…0.output.dense', 'head')
    """
    return name if len(name) <= width else "…" + name[len(name) - max(width - 1, 1) :]


class ReportText:
    """A rich renderable that knows how wide it is only when it is printed."""

    def __init__(self, data: Json) -> None:
        self._data = clean(data)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        groups = view.groups(self._data)
        yield from _head(self._data)
        yield from _end_to_end(self._data, width)
        yield from _time(self._data, groups, width)
        yield from _sites(self._data, groups, width)
        yield from _attention(self._data, width)
        yield from _refusals(self._data, width)
        yield from _facts(self._data)


def _title(text: str, more: str = "") -> Text:
    return Text.assemble("\n", (text, "bold"), (f"  {more}" if more else "", "dim"))


LEAST_NAME, LEAST_WORDS = 30, 22
"""Columns that names keep, and that words which may wrap take at least."""
_GAP = 3
"""Columns of space between two cells of a table without lines."""


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    width: int,
    right: str = "",
    wrapped: str = "",
) -> Table:
    """A quiet table whose first column, names, takes what the others leave.

    Args:
        columns: headings.
        rows: cells; a :class:`Text` keeps its style.
        width: of the console.
        right: headings of the columns to align right, separated by bars.
        wrapped: heading of a column of words that may take several lines.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False)
    for name in columns:
        table.add_column(Text(name), no_wrap=True, overflow="ellipsis")
        if name and name in right.split("|"):
            table.columns[-1].justify = "right"
    cells = [[c if isinstance(c, Text) else Text(c) for c in row] for row in rows]
    others = zip(*([Text(c) for c in columns], *cells), strict=True)
    widths = [max(c.cell_len for c in column) for column in others][1:]
    for at, name in enumerate(columns[1:]):
        if name == wrapped and sum(widths) + _GAP * len(widths) > width - LEAST_NAME:
            widths[at] = min(widths[at], LEAST_WORDS)
            table.columns[at + 1].no_wrap = False
            table.columns[at + 1].max_width = widths[at]
    room = max(width - sum(widths) - _GAP * len(widths), 16)
    for column, needed in zip(table.columns[1:], widths, strict=True):
        column.min_width = min(needed, max(8, (width - 16) // 3))
    for first, *rest in cells:
        cut = Text(shorten(first.plain, room), first.style) if not first.spans else first
        table.add_row(cut, *rest)
    return table


def _head(data: Json) -> Iterator[Text | Table]:
    kind = "what could change" if data["kind"] == "inspect" else "rewrite report"
    name = shorten_end(data["model"], 60)
    yield Text.assemble(("structc ", "bold cyan"), (kind, "cyan"), " · ", (name, "bold"))
    yield Text(f"\n{data['headline']}\n", "bold")
    table = Table.grid(padding=(0, 2))
    for line in view.budget_lines(data):
        mark, style = {True: ("held", "green"), False: ("NOT HELD", "bold red")}.get(
            line["held"], ("unknown", "yellow")
        )
        text = Text(f"{line['demand']}: {line['outcome']}")
        table.add_row(Text(line["label"], "dim"), Text(mark, style), text)
    summary = "; ".join(
        f"{label} {value}{f' ({more})' if more else ''}" for label, value, more in view.tiles(data)
    )
    decided = data["kind"] == "compile"
    tier = Text(data["tier"] if decided else "found", "cyan")
    table.add_row(Text("tier" if decided else "so far", "dim"), tier, Text(summary))
    yield table


def _bar(share: float, width: int) -> Text:
    full = round(max(0.0, min(share, 1.0)) * width)
    return Text.assemble(("█" * full, "cyan"), ("░" * (width - full), "dim"))


def _end_to_end(data: Json, width: int) -> Iterator[Text | Table]:
    if not data["latency"]:
        return
    yield _title("End to end", "lower quartile of interleaved rounds")
    slowest = max((r["latency_ms"] or 0.0) for r in data["latency"]) or 1.0
    rows: list[list[str | Text]] = []
    for r in data["latency"]:
        name = Text.assemble((r["name"], "bold green" if r["ours"] else ""))
        name.append(" (best dense)" if r["best_dense"] else "", "dim")
        faster = "" if r["ours"] else times(r["speedup"])
        bar = _bar((r["latency_ms"] or 0.0) / slowest, max(8, min(30, width - 72)))
        rows.append(
            [name, ms(r["latency_ms"]), ms(r["median_ms"]), percent(r["spread"], 1), faster, bar]
        )
    columns = ("version", "latency", "median", "spread", "speedup", "")
    yield _table(columns, rows, width, "latency|median|spread|speedup")


def _time(data: Json, groups: Sequence[view.Group], width: int) -> Iterator[Text | Table]:
    parts = view.slices(data, groups, most=6)
    if not parts:
        return
    after = "could be" if data["kind"] == "inspect" else "after"
    more = "; could be: the fastest forms, quality not checked" if after == "could be" else ""
    yield _title("Where the time goes", f"share of the dense model's time{more}")
    bars = max(8, min(30, width - 66)) / max(*(p.before for p in parts), *(p.after for p in parts))
    rows: list[list[str | Text]] = [
        [p.name, percent(p.before), percent(p.after), _paired(p.before * bars, p.after * bars)]
        for p in parts
    ]
    total = percent(sum(p.before for p in parts)), percent(sum(p.after for p in parts))
    rows.append([Text("all", "bold"), total[0], Text(total[1], "bold"), ""])
    yield _table(("part", "before", after, ""), rows, width, "before|after|could be")


def _paired(before: float, after: float) -> Text:
    """What is left in full blocks, what was saved in light ones, on one common scale."""
    full, saved = round(after), max(round(before) - round(after), 0)
    return Text.assemble(("█" * full, "cyan"), ("░" * saved, "green"))


def _sites(data: Json, groups: Sequence[view.Group], width: int) -> Iterator[Text | Table]:
    if not groups:
        yield _title("Linear layers", "none found")
        return
    kept = groups
    if len(groups) > _MOST_GROUPS:
        order = sorted(range(len(groups)), key=lambda i: -_weight(groups[i]))
        kept = [groups[i] for i in sorted(order[:_MOST_GROUPS])]
    n = count(len(data["sites"]), "site")
    yield _title(
        "Linear layers",
        f"{n} in {count(len(groups), 'group')}; times are sums of kernels timed alone",
    )
    roomy = width >= 120
    word = "fastest form" if data["kind"] == "inspect" else "choice"
    rows = []
    for g in kept:
        shape = [g.shape, str(g.rows)] if roomy else []
        now = f"{number(g.dense_ms)} → {number(g.chosen_ms)}" if g.dense_ms is not None else NONE
        cells = [g.name, *shape, _choices(g), now]
        cells += [times(g.speedup), percent(g.params_kept), g.error_range]
        rows.append([Text(c, "" if g.changed else "dim") for c in cells])
    columns = ["layer", *(["in → out", "rows"] if roomy else []), word, "ms", "speedup", "params"]
    yield _table([*columns, "error"], rows, width, "rows|ms|speedup|params|error", word)
    if len(kept) < len(groups):
        rest = count(len(groups) - len(kept), "more group")
        yield Text(f"{rest} with less time: see the HTML or JSON report", "dim")


def _weight(group: view.Group) -> float:
    return group.before or group.dense_ms or 0.0


def _choices(group: view.Group) -> str:
    found = group.choices
    if len(found) == 1:
        return found[0][1]
    return ", ".join(f"{n}x {text}" for _, text, n in found)


def _attention(data: Json, width: int) -> Iterator[Text | Table]:
    if not data["attention"]:
        return
    yield _title("Attention", attention.attention_note(data))
    rows = [
        [
            row["name"],
            attention.spelling(row),
            attention.mask(row),
            attention.heads(row),
            *(str(row[k]) for k in ("head_dim", "length", "ops")),
            attention.attention_kernel(row),
        ]
        for row in attention.attention_groups(data)[:_MOST_GROUPS]
    ]
    columns = (
        *("layer", "spelling", "mask", "heads", "head dim", "length", "ops"),
        "computed by",
    )
    yield _table(columns, rows, width, "heads|head dim|length|ops")
    legend = attention.head_legend(data)
    if any(css != "f-dense" for css, _, _ in legend):
        text = ", ".join(f"{n} {name}" for _, name, n in legend)
        yield Text(f"Heads: {text}", style="dim")


def _refusals(data: Json, width: int) -> Iterator[Text | Table]:
    found = view.refusal_groups(data)
    if not found:
        return
    yield _title("Why not", count(len(data["refusals"]), "refusal"))
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(max_width=24)
    for row in found[:_MOST_REFUSALS]:
        first = row["example"]
        where = f"{first['family'].replace('_', ' ')} at {shorten(first['site'], 40)}: "
        reason = Text.assemble((where, "dim"), shorten_end(first["reason"], 240))
        table.add_row(Text(f"{row['count']:,}"), Text(row["code"], "yellow"), reason)
    yield table
    if len(found) > _MOST_REFUSALS:
        more = count(len(found) - _MOST_REFUSALS, "more reason")
        yield Text(f"{more}: see the HTML or JSON report", "dim")


def shorten_end(text: str, width: int) -> str:
    """Cut the end of a sentence that is too long for a table."""
    return text if len(text) <= width else text[: width - 1] + "…"


def _facts(data: Json) -> Iterator[Text | Table]:
    yield _title("How")
    table = Table.grid(padding=(0, 2))
    for label, text in view.facts(data):
        table.add_row(Text(label, "dim"), Text(text))
    stages = [f"{s['name']} {number(s['seconds'], 2)}" for s in data["stages"]]
    if stages:
        total = sum(s["seconds"] or 0.0 for s in data["stages"])
        text = f"{number(total)} s: {', '.join(stages)}"
        table.add_row(Text("stages", "dim"), Text(text))
    back = (data["verification"] or {}).get("rolled_back", [])
    if back:
        table.add_row(Text("rolled back", "yellow"), Text(", ".join(back)))
    for note in view.all_notes(data):
        table.add_row(Text("note", "dim"), Text(note))
    yield table
