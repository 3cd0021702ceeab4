"""The rewrite report: data, text, HTML, and what must not break any of them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from structc.attention_records import AttentionSite
from structc.errors import ArtifactCorrupt, ArtifactVersion, ArtifactWrite, ConfigError
from structc.hardware import Target
from structc.records import (
    Candidate,
    Choice,
    InputStats,
    LinearSite,
    NodeRef,
    Plan,
    PlanPoint,
    Price,
    Profile,
    Refusal,
    Sites,
    Timed,
    Verification,
)
from structc.report import Report, build_report
from structc.report.attention import time_left
from structc.report.view import groups, slices

MACHINE = Target("Example CPU @ 2.60GHz (6/143/8)", ("avx512f", "avx2"), 4, 2, "2.13.0+cpu")
CREATED = "2026-01-02T03:04:05+00:00"

# (name, in, out, dense ms of one site, share of the model's time of one site)
LAYERS = (
    ("attention.self.query", 384, 384, 4.6, 0.0103),
    ("attention.self.key", 384, 384, 4.6, 0.0103),
    ("attention.self.value", 384, 384, 4.6, 0.0103),
    ("attention.output.dense", 384, 384, 4.8, 0.0108),
    ("intermediate.dense", 384, 1536, 19.9, 0.0447),
    ("output.dense", 1536, 384, 18.1, 0.0404),
)
RANKS = (32, 64, 96, 128, 192)


def linear_site(name: str, n: int, m: int, rows: int = 8192, **more: Any) -> LinearSite:
    return LinearSite(
        name=name,
        module=name,
        weight=f"{name}.weight",
        bias=f"{name}.bias",
        in_features=n,
        out_features=m,
        transposed=False,
        nodes=(NodeRef("", "linear"),),
        activation="gelu" if "intermediate" in name else "",
        rows=rows,
        dtype=torch.float32,
        group=name.replace("query", "in").replace("key", "in").replace("value", "in"),
        **more,
    )


def candidate(
    site: LinearSite, family: str, hyper: Mapping[str, int], params: int, ms: float, error: float
) -> Candidate:
    dense = next((d for k, _, _, d, _ in LAYERS if site.name.endswith(k)), 4.0)
    kernel = "onednn" if family == "dense" else "tile[64]"
    form = f"block(1,{site.out_features},{site.in_features},1)"
    price = Price(form, site.rows, ms, dense, kernel, {"tile": 64}, "onednn", 0.018, "measured")
    return Candidate(site.name, family, hyper, params, 2 * params, error, price)


def site_candidates(site: LinearSite, dense_ms: float, depth: int) -> list[Candidate]:
    """Dense, low rank at five ranks, Monarch at two sizes: shapes of numbers as measured."""
    n, m = site.in_features, site.out_features
    found = [candidate(site, "dense", {}, n * m, dense_ms, 0.0)]
    for rank in RANKS:
        params = rank * (n + m)
        error = 0.62 * (1 - rank / min(n, m)) ** (2.2 + 0.1 * depth) * (1 + 0.03 * depth)
        ms = dense_ms * (0.13 + 0.88 * params / (n * m))
        found.append(candidate(site, "low_rank", {"rank": rank}, params, ms, error))
    for rank in (8, 16):
        params = 4 * rank * (n + m)
        hyper = {"in_blocks": 4, "out_blocks": 4, "rank": rank}
        ms = dense_ms * (0.3 + 0.95 * params / (n * m))
        found.append(candidate(site, "monarch", hyper, params, ms, 0.71 - 0.02 * rank))
    return found


def model_sites(blocks: int = 6) -> tuple[Sites, dict[str, list[Candidate]], dict[str, float]]:
    linear, found, share = [], {}, {}
    for depth in range(blocks):
        for key, n, m, dense_ms, part in LAYERS:
            site = linear_site(f"encoder.layer.{depth}.{key}", n, m)
            linear.append(site)
            found[site.name] = site_candidates(site, dense_ms, depth)
            share[site.name] = part * 6 / blocks
    attention = tuple(
        AttentionSite(
            f"encoder.layer.{d}.attention.self",
            NodeRef("", f"scaled_dot_product_attention_{d}"),
            "sdpa",
            "padding",
            None,
            12,
            12,
            32,
            256,
            proven="padding",
            kernel="structc" if blocks > 1 else "",
            price=Price("softmax", 8192, 21.0, 33.6, "structc", {}, "sdpa", 0.02, "measured"),
        )
        for d in range(blocks)
    )
    tied = Refusal("embeddings.word_embeddings", "detect", "TIED", "its weight is an embedding too")
    return Sites(tuple(linear), attention, (tied,)), found, share


def model_refusals(sites: Sites) -> list[Refusal]:
    found = []
    for site in sites.linear:
        n = site.in_features
        text = f"in_features {n} is not a power of two; padding would cost 33 % more flops"
        found.append(Refusal(site.name, "butterfly", "POWER_OF_TWO", text))
        if site.in_features == site.out_features:
            text = f"monarch 8x8 takes 4.81 ms, the best dense kernel 4.60 ms at {site.rows} rows"
            found.append(Refusal(site.name, "monarch", "NOT_FASTER", text))
    return found


def model_plan(sites: Sites, back: Sequence[str] = ()) -> Plan:
    choices = {}
    for i, site in enumerate(sites.linear):
        key = site.name.split(".", 3)[-1]
        if key in ("intermediate.dense", "output.dense"):
            choices[site.name] = Choice("low_rank", {"rank": 128 if i < 18 else 192})
        elif key == "attention.output.dense" and i > 12:
            choices[site.name] = Choice("low_rank", {"rank": 96})
        else:
            choices[site.name] = Choice("dense")
    for name in back:
        choices[name] = Choice("dense")
    points = tuple(
        PlanPoint(ms, err, 1 - metric, chosen=ms == 231.0)
        for ms, err, metric in (
            (340.0, 0.0, 1.0),
            (301.0, 0.06, 0.9991),
            (262.0, 0.13, 0.9966),
            (231.0, 0.24, 0.9921),
            (198.0, 0.37, 0.9824),
            (160.0, 0.55, 0.9413),
        )
    )
    weight = {s.name: 0.05 + 0.01 * (i % 9) for i, s in enumerate(sites.linear)}
    return Plan(choices, 231.0, 340.0, 0.24, points, weight, ("milp: optimal in 0.2 s",))


def model_verification(back: Sequence[str] = ()) -> Verification:
    timed = {
        "structc": Timed(402.1, 405.9, 0.014, 9),
        "eager": Timed(590.4, 597.0, 0.022, 9),
        "torch.compile": Timed(530.2, 533.8, 0.011, 9),
    }
    return Verification(
        error=0.21,
        tolerance=None,
        metric_name="similarity_spearman",
        metric_dense=1.0,
        metric_compiled=0.9917,
        max_drop=0.01,
        held=True,
        calls=8,
        rolled_back={site: Choice("low_rank", {"rank": 96}) for site in back},
        replaced=frozenset(s.name for s in model_sites()[0].linear),
        latency=timed,
        runner="graph",
        notes=("similarity_spearman over 512 held-out sentences",),
    )


def build(**changes: Any) -> Report:
    """The sample report, MiniLM-like, with some arguments replaced."""
    sites, found, share = model_sites()
    back = ("encoder.layer.0.attention.output.dense",)
    stats = InputStats(torch.eye(2, dtype=torch.float64), torch.zeros(2), 65536, 0)
    stages = {"capture": 3.1, "detect": 0.1, "calibrate": 14.2, "price": 88.0, "fit": 41.5}
    given: dict[str, Any] = {
        "model_name": "all-MiniLM-L6-v2",
        "target": MACHINE,
        "options": {"budget": {"metric": similarity, "max_drop": 0.01}, "effort": "quick"},
        "sites": sites,
        "time_share": {**share, "attention": 0.168, "other": 0.071},
        "profile": Profile({f"g{i}": stats for i in range(24)}, 8, 65536, ("no row left out",)),
        "candidates": found,
        "refusals": model_refusals(sites),
        "plan": model_plan(sites, back),
        "verification": model_verification(back),
        "stages": {**stages, "select": 0.4, "rewrite": 1.2, "verify": 36.9},
        "peak_memory_mb": 1830.0,
        "packed_bytes": 38_000_000,
        "notes": ("bfloat16 would give 1.9x on this machine; pass dtype= to allow it",),
    }
    return fixed(build_report(**{**given, **changes}))


def similarity(model: object) -> float:
    return float(model is not None)


def fixed(report: Report) -> Report:
    """The report without what differs from machine to machine."""
    data = report.to_dict()
    return Report.from_dict({**data, "created": CREATED, "versions": {"structc": "0.1.0"}})


def inspected(**changes: Any) -> Report:
    sites, found, _ = model_sites()
    unfitted = {
        k: [Candidate(c.site, c.family, c.hyper, c.params, c.flops, math.nan, c.price) for c in v]
        for k, v in found.items()
    }
    given = {"plan": None, "verification": None, "profile": None, "candidates": unfitted}
    return build(**{**given, "sites": sites, "notes": (), **changes})


HOSTILE = "a\x1b[31m\x1b]0;owned\x07\u202e<script>alert(1)</script>\r\n'\"&{{ 7 * 7 }}[red]"


def many(n: int) -> Report:
    """n sites that have nothing in common but their shape."""
    linear = [linear_site(f"part_{i:03d}.{'x' * (i % 50)}.proj", 384, 384) for i in range(n)]
    found = {s.name: site_candidates(s, 1.0, i % 7) for i, s in enumerate(linear)}
    plan = Plan({s.name: Choice("low_rank", {"rank": 32}) for s in linear})
    return build(sites=Sites(tuple(linear), (), ()), candidates=found, plan=plan, refusals=())


def empty(**changes: Any) -> Report:
    nothing = {"sites": Sites((), (), ()), "candidates": {}, "refusals": (), "time_share": {}}
    return build(**{**nothing, "plan": Plan({}), "verification": None, "profile": None, **changes})


def diverged() -> Report:
    sites, found, _ = model_sites(1)
    worse = {
        k: [Candidate(c.site, c.family, c.hyper, c.params, c.flops, math.inf, c.price) for c in v]
        for k, v in found.items()
    }
    plan = Plan({s.name: Choice("low_rank", {"rank": 32}) for s in sites.linear})
    return build(sites=sites, candidates=worse, plan=plan, packed_bytes=0)


def refused() -> Report:
    sites, _, _ = model_sites(1)
    plan = Plan({s.name: Choice("dense") for s in sites.linear})
    return build(
        sites=sites,
        candidates={},
        refusals=model_refusals(sites),
        plan=plan,
        verification=verified(),
    )


def hostile() -> Report:
    site = linear_site(HOSTILE, 384, 384, tags=frozenset({HOSTILE}))
    found = candidate(site, HOSTILE, {HOSTILE: 3}, 10, 1.0, 0.1)
    v = model_verification()
    timed = {**v.latency, HOSTILE: v.latency["eager"]}
    attention = AttentionSite(
        HOSTILE, NodeRef("", ""), HOSTILE, HOSTILE, None, 1, 1, 1, 1, kernel=HOSTILE
    )
    return build(
        model_name=HOSTILE,
        options={HOSTILE: HOSTILE, "budget": {HOSTILE: [HOSTILE]}},
        sites=Sites((site,), (attention,), ()),
        time_share={HOSTILE: 0.5, "other" + HOSTILE: 0.5},
        candidates={HOSTILE: [found]},
        refusals=[Refusal(HOSTILE, HOSTILE, HOSTILE, HOSTILE)],
        plan=Plan({HOSTILE: Choice(HOSTILE, {HOSTILE: 3})}, notes=(HOSTILE,)),
        verification=Verification(0.1, None, HOSTILE, 1.0, 0.9, 0.2, True, 1, latency=timed),
        stages={HOSTILE: 1.0},
        notes=(HOSTILE,),
    )


def long_names() -> Report:
    site = linear_site("model." + "very_long_module_name." * 20 + "proj", 384, 384)
    found = {site.name: site_candidates(site, 4.0, 1)}
    plan = Plan({site.name: Choice("low_rank", {"rank": 64})})
    return build(
        model_name="m" * 300, sites=Sites((site,), (), ()), candidates=found, plan=plan, refusals=()
    )


CASES: dict[str, Callable[[], Report]] = {
    "compile": build,
    "inspect": inspected,
    "empty": empty,
    "empty-inspect": lambda: empty(plan=None),
    "refused": refused,
    "diverged": diverged,
    "hostile": hostile,
    "long-names": long_names,
    "many": lambda: many(500),
    "unverified": lambda: build(verification=None),
}


@pytest.fixture(scope="module", params=CASES)
def report(request: pytest.FixtureRequest) -> Report:
    return CASES[request.param]()


class Page(HTMLParser):
    """Collects the outline of a page and checks that its tags nest."""

    void = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outline: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self._heading = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        assert not any(name.startswith("on") for name in found), f"{tag} has an event handler"
        self.loads += [v for k in ("src", "href", "srcdoc", "data") if (v := found.get(k))]
        if tag not in self.void:
            self.open.append(tag)
        if tag in ("section", "table", "figure", "svg", "details"):
            name = found.get("id") or found.get("class") or ""
            self.outline.append("  " * self.open.count("section") + f"{tag} {name}".rstrip())

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.outline.append("  " * self.open.count("section") + f"{self.open[-1]} {data}")


def test_text_golden(golden: Callable[[str, str], None], tmp_path: Path) -> None:
    for name in ("compile", "inspect", "refused", "empty"):
        CASES[name]().save(tmp_path / "r.txt")
        golden(f"report/{name}.txt", (tmp_path / "r.txt").read_text(encoding="utf-8"))


def test_html_golden(golden: Callable[[str, str], None]) -> None:
    for name in ("compile", "inspect"):
        golden(f"report/{name}.outline", "\n".join(Page(CASES[name]().to_html()).outline) + "\n")


def test_schema_golden(golden: Callable[[str, str], None]) -> None:
    """The fields of version 1: whoever changes them raises the version."""

    def fields(value: Any, at: str) -> set[str]:
        if isinstance(value, dict):
            return {at, *(f for k, v in value.items() for f in fields(v, f"{at}.{k}"))}
        if isinstance(value, list):
            return {at, *(f for v in value for f in fields(v, f"{at}[]"))}
        return {at}

    data = {k: v for k, v in build().to_dict().items() if k not in ("options", "time_elsewhere")}
    golden("report/schema.txt", "\n".join(sorted(fields(data, "report"))) + "\n")


def test_html_stands_alone(report: Report) -> None:
    text = report.to_html()
    page = Page(text)
    assert all(link.startswith("#") for link in page.loads)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert "http://" not in text and "https://" not in text and "url(" not in text
    assert "default-src 'none'" in text
    assert not re.search("nan%|inf%|None|nanms", text)


def test_json_is_strict_and_round_trips(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["schema_version"] == 1
    again = Report.from_dict(data)
    assert again == report
    assert str(again) == str(report)
    assert again.to_html() == report.to_html()
    assert report.headline and repr(report) and report._repr_html_().startswith("<iframe sandbox")


def test_every_site_has_a_row(report: Report) -> None:
    rows = report.layer_status()
    page = report.to_html()
    assert page.count('<details class="site">') == len(rows) == len(report.data["sites"])
    assert all(not isinstance(v, (dict, list)) for row in rows for v in row.values())


def test_text_is_plain_and_fits(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (60, 80, 100, 140):
        monkeypatch.setenv("COLUMNS", str(width))
        text = str(report)
        assert "\x1b" not in text and "\u202e" not in text
        assert max(len(line) for line in text.splitlines()) <= width
    assert len(text.splitlines()) < 90


def test_hostile_names_stay_text() -> None:
    report = hostile()
    text, page = str(report), report.to_html()
    assert "\x1b" not in text and "owned" not in text and "[red]" in text
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    assert report.layer_status()[0]["name"] == HOSTILE


def test_terminal_colours_on_request() -> None:
    from rich.console import Console

    console = Console(width=100, force_terminal=True, color_system="truecolor", record=True)
    with console.capture() as captured:
        build().print_to(console)
    assert "\x1b[" in captured.get()
    assert "[red]" in console.export_text() or "structc" in captured.get()


def test_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from structc.report.text import to_text

    assert to_text(build().to_dict(), 100, "ascii").isascii()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (build, "Runs 1.32x faster than the best dense version (eager 590 ms, torch.compile"),
        (build, "→ 402 ms) and keeps 99.2 % of similarity_spearman."),
        (lambda: build(verification=None), "Rewrote 16 of 36 linear layers and has not been"),
        (refused, "Nothing was rewritten, because every proposal was refused"),
        (empty, "Nothing was rewritten, because the model has no dense linear layer"),
        (inspected, "36 of 36 linear layers have a faster structured form"),
        (lambda: empty(plan=None), "Nothing here can be rewritten"),
    ],
)
def test_headline(make: Callable[[], Report], expected: str) -> None:
    assert expected in make().headline


def verified(**changes: Any) -> Verification:
    given = {"error": 1e-7, "tolerance": 1e-5, "metric_name": "", "metric_dense": None}
    more = {"metric_compiled": None, "max_drop": None, "held": True, "calls": 2}
    return Verification(**{**given, **more, **changes})


def test_budgets_say_what_holds() -> None:
    tight = build(verification=verified(error=2e-5, held=False))
    assert tight.data["budgets"][0] == {
        "name": "error",
        "limit": 1e-5,
        "value": 2e-5,
        "held": False,
    }
    assert "The budget does not hold." in tight.headline
    asked = {"budget": {"latency": "0.7x", "params": "50%"}}
    rows = {b["name"]: b for b in build(options=asked).data["budgets"]}
    assert rows["latency"]["held"] is False
    assert rows["latency"]["value"] == pytest.approx(402.1 / 530.2)
    assert rows["params"]["held"] is False
    assert rows["never_slower"]["held"] is True


def test_tier_comes_from_the_errors() -> None:
    site = linear_site("a", 384, 384)
    for error, expected in ((1e-8, "exact"), (1e-2, "approximate")):
        found = {"a": [candidate(site, "low_rank", {"rank": 8}, 6144, 1.0, error)]}
        plan = Plan({"a": Choice("low_rank", {"rank": 8})})
        report = build(sites=Sites((site,), (), ()), candidates=found, plan=plan)
        assert report.data["tier"] == expected
    assert (
        build(verification=verified(), sites=Sites((), (), ()), plan=Plan({})).data["tier"]
        == "exact"
    )


def test_a_group_with_an_unfitted_layer_is_not_exact() -> None:
    sites = [linear_site(f"layers.{i}.proj", 384, 384) for i in range(2)]
    found = {s.name: [candidate(s, "low_rank", {"rank": 8}, 6144, 1.0, math.nan)] for s in sites}
    given = {"sites": Sites(tuple(sites), (), ())}

    def shown(exact: int) -> str:
        marked = {
            s.name: [replace(c, exact=i < exact, error=0.0 if i < exact else c.error)]
            for i, s in enumerate(sites)
            for c in found[s.name]
        }
        (group,) = groups(inspected(candidates=marked, **given).data)
        return group.error_range

    assert [shown(exact) for exact in (0, 1, 2)] == ["–", "exact..–", "exact"]


def test_rolled_back_site_runs_dense_and_says_so() -> None:
    row = next(s for s in build().data["sites"] if s["rolled_back"])
    assert row["choice"]["family"] == "dense" and not row["rewritten"]
    assert [c["family"] for c in row["candidates"] if c["status"] == "rolled_back"] == ["low_rank"]
    assert [c["family"] for c in row["candidates"] if c["status"] == "chosen"] == ["dense"]
    assert row["chosen_ms"] == row["dense_ms"]


@pytest.mark.parametrize(("runner", "kernel"), [("inductor", "inductor"), ("graph", "aten")])
def test_a_dense_layer_left_to_the_model_names_who_runs_it(runner: str, kernel: str) -> None:
    verification = replace(model_verification(), runner=runner, replaced=frozenset())
    rows = build(verification=verification).data["sites"]
    dense = [r for r in rows if r["choice"]["family"] == "dense"]
    assert dense and {r["kernel"] for r in dense} == {kernel}
    assert {r["speedup"] for r in dense} == {1.0}


def test_a_paragraph_for_every_site() -> None:
    report = build()
    said = report.explanations()
    names = [s["name"] for s in report.data["sites"]]
    refused = [r["site"] for r in report.data["refusals"] if r["site"] not in ("", *names)]
    attended = [a["name"] for a in report.data["attention"]]
    assert list(said) == [
        *names,
        *attended,
        *dict.fromkeys(r for r in refused if r not in attended),
    ]
    assert refused and all("stays as it is\n  refused" in said[name] for name in refused)
    for site in report.data["sites"]:
        assert ("\n  cost " in said[site["name"]]) == site["rewritten"]
        assert all(r["reason"][:30] in said[site["name"]] for r in site["refusals"][:1])
    plan = replace(model_plan(model_sites()[0]), words=said)
    both = plan.explain("encoder.layer.3.attention.self")
    assert both.count("over the best dense kernel") == 3


def test_every_candidate_is_explained() -> None:
    for site in build().data["sites"]:
        assert sum(c["status"] == "chosen" for c in site["candidates"]) == 1
        assert all(c["why"] for c in site["candidates"] if c["status"] != "chosen")


def test_infinite_errors_are_null_and_marked() -> None:
    found = diverged().data["sites"][0]["candidates"][1]
    assert found["error"] is None and found["diverged"] is True


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.html.gz"])
def test_save_wants_a_known_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.html, \.json or \.txt"):
        build().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_save_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(ArtifactWrite, match="No space left"):
            build().save(path)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(ArtifactWrite, match="cannot be written"):
        build().save(tmp_path / "absent" / "report.html")


def test_from_dict_refuses_what_is_broken() -> None:
    good = build().to_dict()
    for broken in (None, [], {}, {"schema_version": "1"}, {"schema_version": True}):
        with pytest.raises(ArtifactCorrupt):
            Report.from_dict(broken)
    with pytest.raises(ArtifactVersion, match="Update structc"):
        Report.from_dict({**good, "schema_version": 2})
    with pytest.raises(ArtifactCorrupt, match=r"report\.sites: missing"):
        Report.from_dict({k: v for k, v in good.items() if k != "sites"})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("summary", "speedup"), "fast"),
        (("summary", "speedup"), math.nan),
        (("sites", 0, "rows"), 1.5),
        (("sites", 0, "rewritten"), 1),
        (("sites", 0, "fastest"), 99),
        (("sites", 0, "candidates", 0, "error"), "<b>"),
        (("sites", 4, "choice"), None),
        (("refusals", 0, "reason"), None),
        (("packed_bytes",), 10**400),
        (("headline",), ["x"]),
        (("options",), {"x": object()}),
    ],
)
def test_from_dict_names_the_broken_field(path: Sequence[Any], value: object) -> None:
    data = build().to_dict()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    assert path[-1] in inner or isinstance(inner, list)
    inner[path[-1]] = value
    with pytest.raises(ArtifactCorrupt, match="report"):
        Report.from_dict(data)


def test_to_dict_is_a_copy() -> None:
    report = build()
    report.to_dict()["sites"].clear()
    assert report.data["sites"]


def test_import_is_lean() -> None:
    code = "import sys, structc.report; print(*{'torch', 'rich', 'jinja2'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_attention_that_is_faster_takes_less_of_the_time() -> None:
    """By its own times; what is left as it is keeps its time, whatever was measured."""
    ops = [
        {"dense_ms": 4.0, "chosen_ms": 1.0, "kernel": "structc", "by_method": 0},
        {"dense_ms": 4.0, "chosen_ms": 3.0, "kernel": "", "by_method": 2},
        {"dense_ms": 4.0, "chosen_ms": 5.0, "kernel": "", "by_method": 0},
        {"dense_ms": None, "chosen_ms": None, "kernel": "", "by_method": 0},
    ]
    assert time_left({"attention": ops}) == (1 + 3 + 4 + 4) / 16
    assert time_left({"attention": []}) == 1
    data = build().to_dict()
    (slice_,) = [s for s in slices(data, ()) if s.name == "attention"]
    assert slice_.before == 0.168 and slice_.after == pytest.approx(0.168 * time_left(data))
