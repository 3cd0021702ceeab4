"""How a report puts numbers, names and its main sentence into words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Json = dict[str, Any]

NONE = "–"
"""What stands where nothing is known."""

_HIDDEN = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b]*(?:\x07|\x1b\\\\)"  # terminal escape sequences
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def clean(value: Any) -> Any:
    """A copy without terminal escapes, control, direction and surrogate characters in any text.

    Names come from models and artifacts: they must not move a cursor or reorder a line.

    >>> clean({"name": "a\\x1b[31mb\\u202e", "rows": 3})
    {'name': 'ab', 'rows': 3}
    """
    if isinstance(value, str):
        return re.sub(r"\s+", " ", _HIDDEN.sub("", value)).strip()
    if isinstance(value, dict):
        return {clean(k): clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clean(v) for v in value]
    return value


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, without exponents in the usual range.

    >>> number(402.4), number(0.01234), number(12345.6), number(3.1e-7), number(None)
    ('402', '0.0123', '12346', '3.1e-07', '–')
    """
    if value is None:
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        return f"{value:.1e}"
    if size >= 10 ** (digits - 1):
        return f"{value:.0f}"
    places = digits - 1
    while size < 1 and places < 6:
        size, places = size * 10, places + 1
    while size >= 10 and places > 0:
        size, places = size / 10, places - 1
    return f"{value:.{places}f}"


def ms(value: float | None) -> str:
    """Milliseconds for people."""
    return NONE if value is None else f"{number(value)} ms"


def times(value: float | None) -> str:
    """A factor for people: ``1.25x``."""
    return NONE if value is None else f"{value:.2f}x"


def percent(value: float | None, digits: int = 0) -> str:
    """A share.

    >>> percent(0.5), percent(0.9917, 1), percent(0.0004), percent(None)
    ('50 %', '99.2 %', '<1 %', '–')
    """
    if value is None:
        return NONE
    if 0 < value < 10 ** -(digits + 2):
        return f"<{10**-digits:.{digits}f} %"
    return f"{100 * value:.{digits}f} %"


def error(row: Json) -> str:
    """A relative output error; infinite ones and those of mere rounding say so."""
    if row["exact"]:
        return "exact"
    return "infinite" if row["diverged"] else number(row["error"], 2)


def size(n_bytes: float) -> str:
    """
    >>> size(0), size(1536), size(43_000_000)
    ('0 B', '1.5 KiB', '41 MiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{number(n_bytes, 2)} {unit}"
        n_bytes /= 1024
    return f"{number(n_bytes)} GiB"


def count(n: int, noun: str) -> str:
    """
    >>> count(1, "site"), count(1200, "row"), count(2, "batch"), count(3, "family")
    ('1 site', '1,200 rows', '2 batches', '3 families')
    """
    many = f"{noun[:-1]}ies" if noun.endswith("y") else noun + ("es" if noun[-1] in "hx" else "s")
    return f"{n:,} {noun if n == 1 else many}"


def form(family: str, hyper: Json) -> str:
    """A family with its hyperparameters.

    >>> form("low_rank", {"rank": 96}), form("dense", {})
    ('low rank 96', 'dense')
    >>> form("product", {"parts": "diagonal(8,8); transform(8,8,kind=dct2)"})
    'product of diagonal; transform(kind=dct2)'
    """
    name = family.replace("_", " ")
    if set(hyper) == {"rank"}:
        return f"{name} {hyper['rank']}"
    if set(hyper) == {"in_blocks", "out_blocks", "rank"}:
        return f"{name} {hyper['in_blocks']}x{hyper['out_blocks']} rank {hyper['rank']}"
    if set(hyper) == {"parts"}:  # sizes are the site's own
        parts = re.sub(r"\(\d+,\d+,?", "(", str(hyper["parts"])).replace("()", "")
        return f"{name} of {parts}"
    return " ".join([name, *(f"{k} {v}" for k, v in hyper.items())])


def layer_pattern(names: Iterable[str]) -> str:
    """One text for names that differ in their numbers only.

    >>> layer_pattern(["layer.0.q", "layer.1.q", "layer.2.q", "layer.5.q"])
    'layer.{0..2,5}.q'
    """
    parts = [n.split(".") for n in names]
    return ".".join(_alternatives(list(column)) for column in zip(*parts, strict=True))


def _alternatives(values: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(values))
    if len(distinct) == 1:
        return distinct[0]
    runs: list[list[int]] = []
    for n in sorted(map(int, distinct)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(_run(a, b) for a, b in runs) + "}"


def _run(first: int, last: int) -> str:
    if first == last:
        return str(first)
    return f"{first},{last}" if last == first + 1 else f"{first}..{last}"


_INDEX = re.compile("[0-9]{1,9}")


def shape_of_name(name: str) -> str:
    """The name with its numbers taken out: equal for the same layer of repeated blocks."""
    return ".".join("#" if _INDEX.fullmatch(p) else p for p in name.split("."))


_EXACT = {"metric": None, "max_drop": None, "error": None, "latency": None, "params": None}


def headline(data: Json) -> str:
    """What came out, in a sentence."""
    if data["kind"] == "inspect":
        return _possible(data)
    summary, v = data["summary"], data["verification"]
    broken = " The budget does not hold." if v and not v["held"] else ""
    if summary["rewritten"]:
        return f"{_speed(data)} and {_quality(data)}.{broken}"
    why = _why_nothing(data)
    attended = any(op["kernel"] for op in data["attention"])
    ran = bool(v) and (v["runner"] == "inductor" or summary["replaced"] or attended)
    if ran and summary["speedup"] is None and attended:
        return f"Every weight is as it was, because {why}; attention runs on other kernels.{broken}"
    if ran and summary["speedup"] is not None:
        ways = ["graphs compiled by Inductor"] if v["runner"] == "inductor" else []
        ways += ["other kernels for attention"] if attended else []
        heads = sum(op["by_method"] for op in data["attention"])
        ways += [f"{count(heads, 'head')} by methods of their own"] if heads else []
        how = " and ".join(ways or ["other dense kernels"])
        now = f"With {how} it {_lower(_speed(data))} and {_quality(data)}"
        return f"Every weight is as it was, because {why}. {now}.{broken}"
    return f"Nothing was rewritten, because {why}.{broken}"


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _possible(data: Json) -> str:
    summary = data["summary"]
    if not summary["sites"]:
        return "Nothing here can be rewritten: the model has no dense linear layer within reach."
    sites = count(summary["sites"], "linear layer")
    if not any(s["candidates"] for s in data["sites"]):
        return f"Found {sites}; no structured form was priced for them. Nothing was changed."
    best = [
        s["candidates"][s["fastest"]]["speedup"] for s in data["sites"] if s["fastest"] is not None
    ]
    if not best:
        return f"No structured form is faster than dense at any of {sites}. Nothing was changed."
    most = f"up to {times(max(best))} at one layer, quality not checked"
    return f"{len(best)} of {sites} have a faster structured form ({most}). Nothing was changed."


def _why_nothing(data: Json) -> str:
    summary, refusals = data["summary"], data["refusals"]
    if not summary["sites"]:
        return "the model has no dense linear layer within reach"
    if summary["rolled_back"]:
        back = count(summary["rolled_back"], "rewritten layer")
        return f"{back} had to go back before the budget held"
    structured = [c for s in data["sites"] for c in s["candidates"] if c["family"] != "dense"]
    if (data["options"].get("budget") or {}) == _EXACT:
        return "the exact tier keeps them all; a budget with max_drop or error may change them"
    if not structured and refusals:
        code, most = Counter(r["code"] for r in refusals).most_common(1)[0]
        total = count(len(refusals), "refusal")
        return f"every proposal was refused ({total}, {most} of them {code})"
    if not structured:
        return "no structured form was proposed for its layers"
    if not summary["could_be_faster"]:
        return f"none of {count(len(structured), 'candidate')} is faster than the best dense kernel"
    faster = count(summary["could_be_faster"], "layer")
    return f"the faster forms found for {faster} cost more quality than the budget allows"


def _speed(data: Json) -> str:
    summary = data["summary"]
    speed = summary["speedup"]
    if speed is None:
        return f"Rewrote {summary['rewritten']} of {count(summary['sites'], 'linear layer')}"
    dense = [r for r in data["latency"] if not r["ours"]]
    shown = sorted(dense, key=lambda r: -(r["latency_ms"] or 0))
    before = ", ".join(f"{r['name']} {ms(r['latency_ms'])}" for r in shown)
    against = f"the best dense version ({before} → {ms(summary['latency_ms'])})"
    if abs(speed - 1) < noise(data["latency"]):
        return f"Runs as fast as {against}, within the noise of timing"
    if speed < 1:
        return f"Runs at {times(speed)} the speed of {against}"
    return f"Runs {times(speed)} faster than {against}"


LEAST_NOISE, MOST_NOISE = 0.02, 0.1


def noise(latency: Sequence[Json]) -> float:
    """How far two timings of one run may be apart and mean nothing: half of the larger spread.

    >>> noise([{"ours": True, "best_dense": False, "spread": 0.09}])
    0.045
    """
    spreads = [r["spread"] or 0.0 for r in latency if r["ours"] or r["best_dense"]]
    return min(MOST_NOISE, max([LEAST_NOISE, *(s / 2 for s in spreads)]))


def _quality(data: Json) -> str:
    v, summary = data["verification"], data["summary"]
    if not v:
        return "has not been verified on held-out data"
    if summary["metric_kept"] is not None:
        return f"keeps {_kept(summary['metric_kept'])} of {v['metric_name']}"
    if v["metric_name"] and v["metric_compiled"] is not None:
        before, after = number(v["metric_dense"]), number(v["metric_compiled"])
        return f"moves {v['metric_name']} from {before} to {after}"
    if v["diverged"] or v["error"] is None:
        return "gives outputs that are not finite where the original's are"
    if data["tier"] == "exact":
        return f"gives the same output (largest relative error {number(v['error'], 2)})"
    return f"has a relative output error of {percent(v['error'], 2)}"


def _kept(kept: float) -> str:
    """One decimal, two where one would round a loss away."""
    return percent(kept, 2 if 0.999 <= kept < 1 else 1)
