"""Attention in reports: plain data of each op and of its heads, and how people see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from structc.report.data import (
    candidate_data,
    choice_data,
    explained,
    finite,
    plain,
    refusal_data,
)
from structc.report.words import count, layer_pattern, number, percent, shape_of_name

if TYPE_CHECKING:
    from structc.attention_records import AttentionSite, HeadRow
    from structc.records import Candidate, Plan, Verification

Json = dict[str, Any]
THROUGH = "through transformers' attention interface"
METHODS = (
    "uniform",
    "window_sinks",
    "conv_basis",
    "polynomial",
    "monarch",
    "block_sparse",
    "sparse_low_rank",
)
"""Methods that have a colour of their own in every report."""


# ---------------------------------------------------------------------------- data


def attention_data(
    site: AttentionSite,
    candidates: Sequence[Candidate],
    plan: Plan | None,
    verification: Verification | None,
) -> Json:
    """An attention site, and each head of it, as plain data."""
    price = site.price
    before = verification.rolled_back.get(site.name) if verification else None
    rows = [candidate_data(c, 0) for c in candidates]
    at = explained(rows, choice_data(site.name, plan), plain(before))
    chosen = rows[at] if at is not None and site.by_head else None
    groups = _groups(site.by_head)
    return {
        "name": site.name,
        "spelling": site.spelling,
        "mask_kind": site.mask_kind,
        "scale": finite(site.scale),
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "length": site.length,
        "proven": site.proven,
        "rotary": site.rotary,
        "kernel": f"{site.kernel} {THROUGH}" if site.kernel and site.hooked else site.kernel,
        "dense_ms": None if price is None else finite(price.baseline_ms),
        "chosen_ms": _chosen_ms(site, chosen),
        "baseline": "" if price is None else price.baseline,
        "why": "" if site.refusal is None else f"{site.refusal.code}: {site.refusal.reason}",
        "by_method": sum(len(heads) for _, heads, _, _ in groups),
        "error": None if chosen is None else chosen["error"],
        "sensitivity": finite(plan.sensitivities.get(site.name)) if plan else None,
        "rolled_back": before is not None,
        "candidates": rows,
        "head_rows": [_head(row, groups) for row in site.head_rows],
    }


def _chosen_ms(site: AttentionSite, chosen: Json | None) -> float | None:
    if chosen is not None:
        return finite(chosen["latency_ms"])
    return None if site.price is None else finite(site.price.latency_ms)


def _groups(text: str) -> list[tuple[str, tuple[int, ...], int, int]]:
    if not text:
        return []
    from structc.attention.by_head import groups_of, method_text  # torch; reading does without

    return [(method_text(g.method), g.heads, g.least, g.most) for g in groups_of(text)]


def _head(row: HeadRow, groups: Sequence[tuple[str, tuple[int, ...], int, int]]) -> Json:
    mine = next((g for g in groups if row.head in g[1]), ("", (), 0, 0))
    return {
        "head": row.head,
        "method": mine[0],
        "least": mine[2],
        "most": mine[3],
        "numbers": {k: finite(v) for k, v in row.numbers.items()},
        "tried": [plain(t) for t in row.tried],
        "refused": [refusal_data(r) for r in row.refused],
    }


# ---------------------------------------------------------------------------- for people


def attention_groups(data: Json) -> list[Json]:
    """Attention ops that differ in their block's number only, with how many there are."""
    keys = (
        "spelling",
        "mask_kind",
        "proven",
        "rotary",
        "scale",
        "heads",
        "kv_heads",
        "head_dim",
        "length",
    )
    found: dict[tuple[Any, ...], list[Json]] = {}
    for op in data["attention"]:
        code = op["why"].partition(":")[0]
        key = (shape_of_name(op["name"]), *(op[k] for k in keys), op["kernel"], code)
        found.setdefault(key, []).append(op)
    return [
        {
            **ops[0],
            "name": layer_pattern(o["name"] for o in ops),
            "ops": len(ops),
            "by_method": sum(o["by_method"] for o in ops),
            "every_head": sum(o["heads"] for o in ops),
            **{k: _mean([o[k] for o in ops]) for k in ("dense_ms", "chosen_ms")},
        }
        for ops in found.values()
    ]


def attention_note(data: Json) -> str:
    """How many attention ops are computed another way."""
    done = sum(bool(op["kernel"]) for op in data["attention"])
    heads = sum(op["by_method"] for op in data["attention"])
    every = sum(op["heads"] for op in data["attention"])
    by_head = f", {heads} of {count(every, 'head')} by a method of its own" if heads else ""
    return f"{done} by a faster kernel{by_head}" if done or heads else "as they are"


def time_left(data: Json) -> float:
    """The share of attention's time that is left; an op of unknown time weighs as the mean."""
    known = [op["dense_ms"] for op in data["attention"] if op["dense_ms"]]
    mean = sum(known) / len(known) if known else 1.0
    before = after = 0.0
    for op in data["attention"]:
        dense = op["dense_ms"] or mean
        rewritten = op["dense_ms"] and (op["kernel"] or op["by_method"])
        before += dense
        after += op["chosen_ms"] if rewritten and op["chosen_ms"] is not None else dense
    return after / before if before else 1.0


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def attention_kernel(op: Json) -> str:
    """What computes an attention, and how much faster that is; or why nothing else does."""
    ours, dense = op["chosen_ms"], op["dense_ms"]
    heads = f", {op['by_method']} of {op['every_head']} heads by methods" if op["by_method"] else ""
    if not op["kernel"] and not heads:
        why = op["why"].partition(":")[0].lower().replace("_", " ")
        return f"as it is ({why})" if why else "as it is"
    name = "PyTorch, no mask" if op["kernel"] == "torch" else op["kernel"] or "structc"
    return f"{name}, {dense / ours:.2f}x{heads}" if ours and dense else f"{name}{heads}"


def heads(op: Json) -> str:
    """Query heads, and key/value heads where they are fewer."""
    same = op["heads"] == op["kv_heads"]
    return str(op["heads"]) if same else f"{op['heads']} / {op['kv_heads']} kv"


def mask(op: Json) -> str:
    """What the graph proves of the mask, or else what it showed; and whether positions rotate."""
    text = str(op["proven"] or op["mask_kind"]).replace("_", " ")
    return f"{text}; rotary" if op["rotary"] else text


def spelling(op: Json) -> str:
    """How the model has it: one op, or the products and the softmax."""
    return "SDPA" if op["spelling"] == "sdpa" else "spelled out"


def method_class(method: str) -> str:
    """The style class of a method: one colour in every report; exact heads are grey."""
    name = method.partition("(")[0]
    if not name:
        return "f-dense"
    return f"f{METHODS.index(name) if name in METHODS else len(METHODS)}"


def head_grid(data: Json) -> list[Json]:
    """For each attention whose heads were looked at, a cell a head with what it says when asked."""
    return [
        {
            "name": op["name"],
            "cells": [
                {**row, "css": method_class(row["method"]), "title": head_title(row)}
                for row in op["head_rows"]
            ],
            "speedup": op["dense_ms"] / op["chosen_ms"]
            if op["chosen_ms"] and op["dense_ms"]
            else 0,
            "error": op["error"],
            "rolled_back": op["rolled_back"],
        }
        for op in data["attention"]
        if op["head_rows"]
    ]


def head_title(row: Json) -> str:
    """A head in a few lines: its method, what it costs, or what spoke against the others."""
    lines = [f"head {row['head']}: {row['method'] or 'exact'}"]
    trial = next((t for t in row["tried"] if same_method(t["method"], row["method"])), None)
    if trial is not None:
        lines[0] += f", {row['least']} to {row['most']} keys"
        lines.append(
            f"output error {percent(trial['error'], 1)}, KL {number(trial['kl'], 2)} nats, "
            f"TV at most {number(trial['tv'], 2)}, off by at most {number(trial['bound'], 2)}, "
            f"{trial['speedup']:.1f}x over the exact kernel"
        )
    elif row["tried"]:
        best = min(row["tried"], key=lambda t: t["error"] if t["error"] is not None else 1e9)
        lines.append(f"nearest: {best['method']}, output error {percent(best['error'], 1)}")
    lines += [f"{r['family']}: {r['reason']}" for r in row["refused"] if r["code"] == "RECALL"]
    return "\n".join(lines)


def same_method(tried: str, chosen: str) -> bool:
    """Whether a method that was tried is the chosen one, which has its scale beside it."""
    return bool(chosen) and chosen.startswith(tried[:-1])


def head_legend(data: Json) -> list[tuple[str, str, int]]:
    """Style class, name and number of heads of each method in use, exact ones last."""
    found: dict[str, int] = {}
    for op in data["attention"]:
        for row in op["head_rows"]:
            name = row["method"].partition("(")[0]
            found[name] = found.get(name, 0) + 1
    order = sorted(found, key=lambda n: (not n, -found[n]))
    return [(method_class(n), n.replace("_", " ") if n else "exact", found[n]) for n in order]


def attention_words(op: Mapping[str, Any]) -> str:
    """One attention in a paragraph: what computes it, and its heads."""
    lines = [f"{op['name']}: {op['kernel'] or 'as it is'}"]
    if op["dense_ms"] is not None and op["chosen_ms"] is not None:
        lines.append(f"  time      {number(op['dense_ms'])} -> {number(op['chosen_ms'])} ms")
    if op["by_method"]:
        lines.append(f"  cost      output error {percent(op['error'], 1)}")
    if op["why"]:
        lines.append(f"  why not   {op['why']}")
    if op["rolled_back"]:
        lines.append("  verified  heads went back when the whole model was verified")
    for row in op["head_rows"]:
        first, *more = head_title(dict(row)).split("\n")
        lines += [f"  {first}", *(f"      {line}" for line in more)]
    return "\n".join(lines)
