"""The per-head tier: planted heads get their methods, the recalling one stays exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structc
from structc import Budget, heads
from structc.attention.base import AbstractMethod
from structc.attention.by_head import groups_of
from structc.attention_records import PER_HEAD, AttentionCase
from structc.codegen.head_price import HeadPrice
from structc.inputs import calibration_calls, to_call
from structc.options import Log, resolve
from structc.passes import trial
from structc.passes.acceptance import verify_product
from structc.passes.calibrate import Parts, split
from structc.passes.capture import capture
from structc.passes.detect import detect
from structc.passes.objective import Objectives
from structc.passes.race import Raced
from structc.passes.select import Table
from structc.passes.survey_heads import by_head_refused, watch
from structc.records import Captured, Plan, Price, Refusal, Sites
from structc.workdir import WorkDir

H, D, N, VOCABULARY = 4, 16, 300, 100
LOCAL, FLAT, RECALLS, SHARP = range(H)


class Planted(nn.Module):
    """One attention over tokens whose heads do what their names say."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("tokens", torch.randn(VOCABULARY, D, generator=generator))
        self.register_buffer("mix", torch.randn(H * D, 8, generator=generator) / 8)
        self.register_buffer("shift", torch.randn(D, D, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        x = F.normalize(self.tokens[ids], dim=-1)
        before = F.pad(x, (0, 0, 1, 0))[:, :n]
        at = torch.arange(n)[:, None] / (40.0 * torch.arange(1, D // 2 + 1))
        place = torch.cat([at.cos(), at.sin()], 1).expand_as(x)
        q = torch.stack([300 * place, 0.01 * x, 60 * x, 40 * x @ self.shift], 1)
        k = torch.stack([place, x, before, x], 1)
        v = torch.stack([x] * H, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2) @ self.mix


def tokens(seed: int, n: int = N) -> Tensor:
    return torch.randint(VOCABULARY, (1, n), generator=torch.Generator().manual_seed(seed))


def priced(
    case: AttentionCase, methods: list[AbstractMethod], **_: Any
) -> dict[AbstractMethod, HeadPrice | Refusal]:
    """By operations, as no clock of this machine says it."""
    exact = 4.0 * case.queries * case.keys * case.head_dim / 2
    return {
        m: HeadPrice(m.flops(N, N, D) / 1e6, exact / 1e6, 0.0, 256)
        if m.flops(N, N, D) < 0.9 * exact
        else Refusal("", m.name, "NOT_FASTER", "more operations")
        for m in methods
    }


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> tuple[Captured, Sites, Parts, Log]:
    monkeypatch.setattr(heads, "price_methods", priced)
    captured = capture(Planted(), to_call(tokens(0)))
    sites = detect(captured)
    ours = tuple(replace(s, kernel="structc") for s in sites.attention)
    parts = split(calibration_calls([tokens(seed) for seed in range(1, 7)]))
    return captured, replace(sites, attention=ours), parts, Log()


def candidates(prepared: tuple[Captured, Sites, Parts, Log], **options: Any) -> tuple[Sites, Table]:
    captured, sites, parts, notes = prepared
    options = resolve(**{"budget": Budget(error=0.3), "effort": "quick", **options})
    work = WorkDir(options.work_dir, {})
    return heads.by_head_candidates(captured, sites, parts, options, work, notes)


def test_planted_heads_are_found(prepared: tuple[Captured, Sites, Parts, Log]) -> None:
    sites, table = candidates(prepared)
    (site,) = sites.attention
    row = table[site.name]
    assert [c.family for c in row] == ["dense"] + [PER_HEAD] * (len(row) - 1)
    tight = {h: g.method.name for g in groups_of(row[1].price.form) for h in g.heads}
    assert tight[FLAT] == "uniform" and tight[LOCAL] in ("window_sinks", "conv_basis")
    for candidate in row[1:]:
        used = {h for g in groups_of(candidate.price.form) for h in g.heads}
        assert RECALLS not in used
        assert 0 < candidate.error <= int(candidate.hyper["permille"]) / 1000
        assert candidate.price.latency_ms < row[0].price.latency_ms
    errors = [c.error for c in row]
    assert errors == sorted(errors)


def test_each_head_says_what_was_tried_and_why_not(
    prepared: tuple[Captured, Sites, Parts, Log],
) -> None:
    sites, _ = candidates(prepared)
    rows = sites.attention[0].head_rows
    assert [r.head for r in rows] == list(range(H))
    assert rows[RECALLS].numbers["recall"] > 0.9 and rows[RECALLS].refused[0].code == "RECALL"
    assert rows[FLAT].numbers["recall"] < 0.1
    window = next(t for t in rows[LOCAL].tried if t.method.startswith("window_sinks"))
    assert window.error < 0.3 and window.kl >= 0 and 0 <= window.tv <= 1
    for row in rows:
        assert {t.method.partition("(")[0] for t in row.tried} | {r.family for r in row.refused}
        assert all(r.reason and r.site == sites.attention[0].name for r in row.refused)


def lab_of(prepared: tuple[Captured, Sites, Parts, Log], sites: Sites, budget: Budget) -> trial.Lab:
    captured, _, parts, _ = prepared
    objectives = Objectives(captured, None, {})
    work = WorkDir(None, {})
    return trial.Lab(captured.tree, captured, sites, objectives, parts, budget, work)


def silent(*_: Any) -> None:
    pass


def test_selection_takes_them_inside_the_budget(
    prepared: tuple[Captured, Sites, Parts, Log],
) -> None:
    budget = Budget(error=0.05)
    sites, table = candidates(prepared, budget=budget)
    lab = lab_of(prepared, sites, budget)
    plan = trial.select_plan(lab, table, silent)
    assert plan.choices[sites.attention[0].name].family == PER_HEAD
    product = lab.product(plan, table)
    assert product.by_head == {sites.attention[0].name}
    operator = torch.ops.structc.attention_by_head.default
    assert product.runners[0].region.graph.graph.find_nodes(op="call_function", target=operator)
    assert 0 < lab.error(product, "verify") < 0.1
    short = tokens(9, 40)
    torch.testing.assert_close(product.tree(short), Planted()(short))


def test_what_breaks_the_budget_goes_back(prepared: tuple[Captured, Sites, Parts, Log]) -> None:
    sites, table = candidates(prepared)
    name = sites.attention[0].name
    lab = lab_of(prepared, sites, Budget(error=1e-5))
    loose = table[name][-1]
    plan = Plan({name: structc.records.Choice(PER_HEAD, loose.hyper)}, sensitivities={name: 1.0})
    _, settled, verification = verify_product(
        lab,
        table,
        plan,
        lab.product(plan, table),
        effort="none",
        verify=True,
        progress=silent,
        fast_chains=lambda _: (),
    )
    assert settled.choices[name].family == "dense"
    assert verification.held and name in verification.rolled_back
    assert lab.sites.attention[0].kernel == "structc"  # exact attention is not blamed


def test_other_attentions_are_refused_with_a_reason() -> None:
    captured = capture(Planted(), to_call(tokens(0, 40)))
    (site,) = detect(captured).attention
    refusal = by_head_refused(site)
    assert refusal is not None and refusal.code == "SHORT"
    assert site.case is not None
    for change, code in (
        ({"mask": "bool"}, "FORM"),
        ({"sink": True}, "FORM"),
        ({"lags": 4}, "FORM"),
        ({"queries": 7}, "SIZE"),
    ):
        refusal = by_head_refused(replace(site, case=replace(site.case, **change)))
        assert refusal is not None and refusal.code == code


class Kept(nn.Module):
    """Attention whose padding comes under a name of its own, inverted or not."""

    def __init__(self, hides: bool) -> None:
        super().__init__()
        self.q, self.hides = nn.Linear(8, 8), hides

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        q = self.q(x)[:, None]
        scores = (q @ q.mT).masked_fill(which[:, None, None], -1e9)
        seen = ~which[:, None, None]
        return (
            scores.softmax(-1) @ q if self.hides else F.scaled_dot_product_attention(q, q, q, seen)
        )


@pytest.mark.parametrize("hides", [True, False])
def test_calls_with_padding_are_not_looked_at(hides: bool) -> None:
    """Whatever the argument is called: the attention's own mask says it."""
    x, none = torch.randn(2, 300, 8), torch.zeros(2, 300, dtype=torch.bool)
    some = none.clone()
    some[1, 299] = True
    captured = capture(Kept(hides), to_call((x, some)))
    (site,) = detect(captured).attention
    assert site.case is not None and site.case.padded and by_head_refused(site) is None
    for which, count in ((none, 1), (some, 0)):
        shown: list[int] = []
        watch(
            captured,
            [site],
            calibration_calls([(x, which)]),
            lambda s, q, k, v, shown=shown: shown.append(q.shape[2]),  # type: ignore[misc]
            lambda *_: None,
        )
        assert len(shown) == count


@pytest.mark.parametrize("options", [{"budget": Budget()}, {"effort": "none"}])
def test_nothing_is_tried_unasked(
    prepared: tuple[Captured, Sites, Parts, Log], options: dict[str, Any]
) -> None:
    sites, table = candidates(prepared, **options)
    assert not table and not sites.attention[0].head_rows


def test_work_that_is_done_is_read(
    prepared: tuple[Captured, Sites, Parts, Log], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a folder holds is not made again, what it lost is, and the result is the same."""
    first = str(candidates(prepared, work_dir=str(tmp_path)))  # as text: NaN is not itself
    judged: list[int] = []
    judge = heads.judge

    def counted(*args: Any) -> Any:
        judged.append(len(args[2]))
        return judge(*args)

    monkeypatch.setattr(heads, "survey", lambda *_: pytest.fail("surveyed again"))
    monkeypatch.setattr(heads, "judge", counted)
    assert str(candidates(prepared, work_dir=str(tmp_path))) == first and not judged
    (lost,) = tmp_path.glob("heads-select-*.json")
    lost.write_text("half a wri")
    assert str(candidates(prepared, work_dir=str(tmp_path))) == first and judged == [1]


def test_a_product_with_methods_is_saved_and_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(heads, "price_methods", priced)
    # no clock of this machine decides
    graph = lambda model, example, plain, *_: Raced(plain[0], "graph", {})  # noqa: E731
    monkeypatch.setattr("structc.passes.acceptance.race", graph)
    model = Planted()
    data = [tokens(seed) for seed in range(1, 7)]
    fast = structc.compile(model, tokens(0), calibration=data, budget=Budget(error=0.05))
    (row,) = fast.report.to_dict()["attention"]
    assert row["by_method"] >= 2 and row["error"] < 0.1
    assert "uniform" in fast.plan.explain(row["name"])
    assert "heads by methods" in str(fast.report) or "Heads:" in str(fast.report)
    assert "induction score" in fast.report.to_html()
    fast.save(tmp_path / "out")
    again = structc.load(tmp_path / "out", Planted())
    x = tokens(11)
    torch.testing.assert_close(again(x), fast(x))
    assert not torch.equal(again(x), model(x))


def test_without_graphs_attention_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def modules(model: Any, example: Any, plain: Any, *_: Any) -> Raced:
        for runner in plain[0].runners:
            runner.active = False
        return Raced(plain[0], "modules", {})

    def faster(cases: list[AttentionCase], **_: Any) -> dict[AttentionCase, Price]:
        return {
            c: Price(c.form, 1, 1.0, 2.0, "structc", {}, "sdpa", 0.0, "measured") for c in cases
        }

    monkeypatch.setattr(heads, "price_methods", priced)
    monkeypatch.setattr("structc.codegen.attention_price.price", faster)
    monkeypatch.setattr("structc.passes.acceptance.race", modules)
    model = Planted()
    data = [tokens(seed) for seed in range(1, 7)]
    fast = structc.compile(model, tokens(0), calibration=data, budget=Budget(error=0.05))
    (row,) = fast.report.to_dict()["attention"]
    assert not row["kernel"] and not row["by_method"] and "without graphs" in row["why"]
    assert torch.equal(fast(tokens(3)), model(tokens(3)))


def test_an_attention_can_be_left_alone() -> None:
    (row,) = structc.inspect(Planted(), tokens(0)).to_dict()["attention"]
    assert not row["why"].startswith("IGNORED")
    (row,) = structc.inspect(Planted(), tokens(0), ignore=[row["name"]]).to_dict()["attention"]
    assert row["why"].startswith("IGNORED") and not row["kernel"]
