"""Attention in every spelling becomes one operator, and the model computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import ZOO, floats

import structc
from structc import ops
from structc.codegen import attention_price
from structc.inputs import to_call
from structc.passes.attention_parts import SDPA, SOFTMAX
from structc.passes.capture import capture
from structc.passes.detect import detect
from structc.passes.rewrite import rewrite
from structc.passes.rewrite_attention import OPERATOR, Planned, planned, replace_attention
from structc.records import Price, Refusal, Timed

H, D = 4, 6


class Spelled(nn.Module):
    """Attention on projections of x, by a function of (q, k, v)."""

    def __init__(self, f: Callable[..., Tensor], kv_heads: int = H) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(H * D, H * D), nn.Linear(H * D, 2 * kv_heads * D)
        self.bias = nn.Parameter(torch.randn(H))
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, H, D).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, -1, D).permute(2, 0, 3, 1, 4)
        y = self.f(q, k, v, self.bias)
        return y.reshape(b, H, n, D).transpose(1, 2).reshape(b, n, H * D)


def lower(q: Tensor) -> Tensor:
    at = torch.arange(q.shape[-2])
    return at[:, None] >= at[None]


def repeated(k: Tensor) -> Tensor:
    b, g, n, d = k.shape
    return k[:, :, None].expand(b, g, H // g, n, d).reshape(b, H, n, d)


def plain(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2)) / 3.0).softmax(-1) @ v


def scaled_first(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = torch.matmul(q * 0.3, k.transpose(2, 3))
    scores = scores.masked_fill(~lower(q), float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1), 0.1, training=False) @ v


def float_softmax(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = torch.where(lower(q), q @ k.mT * 0.4, torch.finfo(q.dtype).min)
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.4
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def by_other_einsum(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) * 0.4
    return torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).transpose(1, 2)


def by_bmm(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    b, h, n, d = q.shape
    flat = [t.reshape(b * h, n, d) for t in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)) * 0.4
    scores = scores.view(b, h, n, n).masked_fill(~lower(q), float("-inf")).view(b * h, n, n)
    return torch.bmm(scores.softmax(-1), flat[2]).view(b, h, n, d)


def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    scores = q @ k.mT * 0.4 + bias[:, None, None] * (at[:, None] - at).abs()
    return scores.softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * 0.4 / 5.0) * 5.0
    return scores.masked_fill(~lower(q), float("-inf")).softmax(-1) @ v


def with_sink(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.4).masked_fill(~lower(q), -1e38)
    extra = bias.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    both = torch.cat([scores, extra], -1)
    both = both - both.max(-1, keepdim=True).values
    return both.softmax(-1)[..., :-1] @ v


def grouped(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=lower(q))


def grouped_spelled(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (q @ repeated(k).transpose(2, 3) * 0.4).softmax(-1) @ repeated(v)


def flagged(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)


def bias_a_head_in_three(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    b, h, n, d = q.shape
    flat = [t.reshape(b * h, n, d) for t in (q, k, v)]
    alibi = (bias[None, :, None, None] * torch.arange(n)).expand(b, h, 1, n).reshape(b * h, 1, n)
    scores = torch.baddbmm(alibi, flat[0], flat[1].transpose(1, 2), beta=1, alpha=0.4)
    return torch.bmm(scores.softmax(-1), flat[2]).view(b, h, n, d)


def by_log_softmax(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT * 0.4, -1).exp() @ v


def by_exponentials(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.4).masked_fill(~lower(q), float("-inf"))
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def strictly_before(q: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    return at[:, None] > at


def dead_rows_zeroed(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~strictly_before(q), float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


def dead_rows(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    return (q @ k.mT).masked_fill(at[:, None] <= at, float("-inf")).softmax(-1) @ v


def filled_with_a_number(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~lower(q), -1e9).softmax(-1) @ v


def capped_and_shifted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT) + bias[:, None, None]  # which may be as low as the fill
    return scores.masked_fill(~lower(q), -1e9).softmax(-1) @ v


def zeroed_after_a_finite_fill(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~strictly_before(q), torch.finfo(q.dtype).min)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def other_documents(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    numbers = (q[:, 0, :, 0] > 0).long().cumsum(-1)
    other = numbers[:, None, :, None] != numbers[:, None, None, :]
    return (q @ k.mT).masked_fill(~other, float("-inf")).softmax(-1) @ v


def capped_and_filled(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * 0.4 / 5.0) * 5.0
    return scores.masked_fill(~lower(q), -1e9).softmax(-1) @ v


def capped_and_chosen(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * 0.4 / 5.0) * 5.0
    return torch.where(lower(q), scores, -1e4).softmax(-1) @ v


def documents(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    numbers = (q[:, 0, :, 0] > 0).long().cumsum(-1)
    same = numbers[:, None, :, None] == numbers[:, None, None, :]
    return (q @ k.mT).masked_fill(~(same & lower(q)), float("-inf")).softmax(-1) @ v


def flat(of: Tensor) -> Tensor:
    """Batch and heads as one dimension."""
    return of.reshape(-1, *of.shape[2:])


def odd_keys(q: Tensor) -> Tensor:
    """Others for each sequence and head: (B, H, 1, n)."""
    return (q[..., 0] > 0)[:, :, None]


def einsum_of_flat_masks(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    b, h, n, _d = q.shape
    low = torch.where(odd_keys(q), 0.0, -2.0)
    scores = flat(torch.einsum("bhid,bhjd->bhij", q, k)) + flat(low)
    return torch.einsum("bhij,bhjd->bhid", scores.reshape(b, h, n, n).softmax(-1), v)


def filled_in_three(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = torch.bmm(flat(q), flat(k).mT).masked_fill(flat(odd_keys(q)), -1e9)
    return torch.bmm(scores.softmax(-1), flat(v)).reshape(q.shape)


def chosen_in_three(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = torch.where(flat(odd_keys(q)), torch.bmm(flat(q), flat(k).mT), -1e9)
    return torch.bmm(scores.softmax(-1), flat(v)).reshape(q.shape)


SPELLINGS: dict[str, tuple[Callable[..., Tensor], int, str]] = {
    "plain": (plain, H, "all_true"),
    "scaled first": (scaled_first, H, "causal"),
    "float softmax": (float_softmax, H, "causal"),
    "einsum": (by_einsum, H, "all_true"),
    "another einsum": (by_other_einsum, H, "all_true"),
    "bmm": (by_bmm, H, "causal"),
    "bias": (with_bias, H, "all_true"),
    "softcap": (capped, H, "causal"),
    "sink": (with_sink, H, "causal"),
    "grouped": (grouped, 2, "causal"),
    "grouped, spelled out": (grouped_spelled, 2, "all_true"),
    "is_causal": (flagged, H, "causal"),
    "baddbmm of a bias a head": (bias_a_head_in_three, H, "all_true"),
    "exp of log_softmax": (by_log_softmax, H, "all_true"),
    "exp over its sum": (by_exponentials, H, "causal"),
    "rows without keys set to 0": (dead_rows_zeroed, H, "up to -1"),
    "softcap, then -1e9": (capped_and_filled, H, "causal"),
    "softcap, else -1e4": (capped_and_chosen, H, "causal"),
    "documents": (documents, H, "causal, documents"),
    "rows without keys": (dead_rows, H, "up to -1"),
    "-1e9": (filled_with_a_number, H, "causal"),
    "softcap, bias, then -1e9": (capped_and_shifted, H, "causal"),
    "means set to 0": (zeroed_after_a_finite_fill, H, "up to -1"),
    "other documents": (other_documents, H, "data_dependent"),
    "einsum, a bias a head in three": (einsum_of_flat_masks, H, "all_true"),
    "hidden a head in three": (filled_in_three, H, "data_dependent"),
    "chosen a head in three": (chosen_in_three, H, "data_dependent"),
}


def rewritten(model: nn.Module, inputs: Any, kernel: str = "structc") -> tuple[Any, list[Any]]:
    """A graph with its attention replaced, and what was planned."""
    captured = capture(model.eval(), to_call(inputs))
    (region,) = captured.regions
    graph = region.graph.graph
    found = []
    for node in list(graph.nodes):
        if node.op == "call_function":
            plan = planned(node)
            if isinstance(plan, Planned):
                replace_attention(graph, plan, {n.name: n for n in graph.nodes}, kernel)
            if plan is not None:
                found.append(plan)
    graph.eliminate_dead_code()
    graph.lint()
    return captured, found


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    f, kv_heads, proven = SPELLINGS[name]
    model = Spelled(f, kv_heads)
    captured, (plan,) = rewritten(model, floats(2, 9, H * D))
    assert isinstance(plan, Planned) and str(plan.rule) == proven, plan
    graph = captured.regions[0].graph.graph
    (node,) = graph.find_nodes(op="call_function", target=OPERATOR)
    left = [n for n in graph.nodes if n.target in (SDPA, *SOFTMAX)]
    assert not left, "the original is computed as well"
    assert plan.bias is not None or node.args[3] is None


def product_of(model: nn.Module, inputs: Any) -> Any:
    """The model with every attention replaced that can be; nothing is timed."""
    captured = capture(model, to_call(inputs))
    sites = detect(captured)
    able = tuple(replace(a, kernel="structc" if a.case else "") for a in sites.attention)
    return rewrite(captured, replace(sites, attention=able), {}).tree, able


@pytest.mark.parametrize("name", SPELLINGS)
def test_products_compute_the_same(name: str) -> None:
    """At other sizes too."""
    f, kv_heads, _ = SPELLINGS[name]
    model = Spelled(f, kv_heads).eval()
    fast, (site,) = product_of(model, floats(2, 9, H * D))
    assert site.kernel and site.refusal is None, site.refusal
    for shape in ((2, 9, H * D), (3, 33, H * D), (1, 100, H * D)):
        x = torch.randn(shape)
        with torch.no_grad():
            calls = ops.call_count()
            y = fast(x)
            assert ops.call_count() > calls
            assert torch.allclose(y, model(x), atol=1e-5, equal_nan=True)


def read_too(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.mean()


def dropped(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), 0.5, training=True) @ v


def weakly_hidden(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~lower(q), -5.0).softmax(-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (k @ q.mT).softmax(-2).mT @ v


def raw_exponentials(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT)
    return (e / e.sum(-1, keepdim=True)) @ v


def one_more(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT)
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


def one_more_beside_a_sink(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT
    extra = bias.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    e = torch.exp(torch.cat([scores, extra], -1))
    return (e / (1 + e.sum(-1, keepdim=True)))[..., :-1] @ v


def sharpened(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).square() @ v


def scaled_by_a_tensor(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * bias[:, None, None]).softmax(-1) @ v


def capped_after(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (torch.tanh((q @ k.mT).masked_fill(~lower(q), float("-inf")) / 2) * 2).softmax(-1) @ v


def shifted_before_cap(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = q @ k.mT
    return (torch.tanh(scores - scores.amax(-1, keepdim=True)) * 2).softmax(-1) @ v


def shifted_before_sink(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT
    scores = scores - scores.amax(-1, keepdim=True)
    extra = bias.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, extra], -1).softmax(-1)[..., :-1] @ v


def hidden_beside_a_sink(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    extra = bias.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    n, at = q.shape[2], torch.arange(q.shape[2] + 1)
    hidden = at > at[:n, None]  # the sink too
    scores = torch.cat([q @ k.mT, extra], -1).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1)[..., :-1] @ v


def hidden_behind_its_maximum(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = (q - 200) @ (k + 200).mT  # about as low as the fill, and only before this
    scores = scores - scores.amax(-1, keepdim=True)
    return scores.masked_fill(~lower(q), -1e4).softmax(-1) @ v


def whole_scores(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (q @ k.mT).to(torch.int32).to(q.dtype).softmax(-1) @ v


def whole_weights(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).to(torch.int32).to(q.dtype) @ v


def written_between(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    values = v.clone()
    weights = (q @ k.mT).softmax(-1)
    values[:, :, 0] = 1.0
    return weights @ values


def test_an_einsum_with_the_weights_second() -> None:
    def second(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", q @ k.mT, weights)[..., : v.shape[-1]] + 0 * v

    model = Spelled(second)
    captured = capture(model.eval(), to_call(floats(2, 9, H * D)))
    nodes = captured.regions[0].graph.graph.nodes
    assert not [n for n in nodes if n.op == "call_function" and isinstance(planned(n), Planned)]


@pytest.mark.parametrize("turned", ["permute", "mT"])
def test_grouped_keys_turned_in_other_ways(turned: str) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        k, v = repeated(k), repeated(v)
        kt = k.mT if turned == "mT" else k.permute(0, 1, 3, 2)
        return (q @ kt).softmax(-1) @ v

    model = Spelled(f, 2).eval()
    fast, (site,) = product_of(model, floats(2, 9, H * D))
    assert site.kernel and site.case.kv_heads == 2
    x = torch.randn(2, 20, H * D)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("f", "code"),
    [(capped_after, "SOFTCAP"), (shifted_before_cap, "SOFTCAP"), (shifted_before_sink, "BIAS"),
     (hidden_beside_a_sink, "SINK"), (hidden_behind_its_maximum, "MASK"),
     (whole_scores, "SPELLING"), (whole_weights, "SPELLING"), (written_between, "WRITTEN"),
     (read_too, "READ"), (weakly_hidden, "MASK"),
     (scaled_by_a_tensor, "SCALE"), (over_queries, "SPELLING"),
     (raw_exponentials, "SPELLING"), (one_more, "SPELLING"),
     (one_more_beside_a_sink, "SPELLING"), (sharpened, "SPELLING")],
)  # fmt: skip
def test_what_is_left_alone(f: Callable[..., Tensor], code: str) -> None:
    _, (plan,) = rewritten(Spelled(f), floats(2, 9, H * D))
    assert isinstance(plan, Refusal) and plan.code == code and plan.reason


def test_what_is_left_alone_has_its_sizes() -> None:
    for f in (weakly_hidden, raw_exponentials, read_too):
        (site,) = detect(capture(Spelled(f).eval(), to_call(floats(2, 9, H * D)))).attention
        assert site.refusal is not None and (site.heads, site.head_dim, site.length) == (H, D, 9)


def test_a_softmax_that_is_no_attention() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.out = nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x) * self.gate(x).softmax(-1).sum(-1, keepdim=True)

    assert rewritten(Router(), floats(2, 9, 8))[1] == []


def test_weights_that_are_dropped() -> None:
    graph = torch.export.export(Spelled(dropped), (floats(2, 9, H * D),)).graph
    found = [planned(n) for n in graph.nodes if n.target in SOFTMAX]
    assert [p.code for p in found if isinstance(p, Refusal)] == ["DROPOUT"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_no_graph_runs_says_so(name: str) -> None:
    """A decoder with a cache is exported in pieces, its attention in none of them."""
    model = ZOO[name].model()
    model.config._attn_implementation = "eager"  # which no function of structc stands for
    (site,) = detect(capture(model, to_call(ZOO[name].call()))).attention
    assert site.case is None and site.refusal is not None and site.refusal.code == "NOT_EXPORTED"


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "encoder"])
def test_real_models_compute_the_same(name: str) -> None:
    inputs = ZOO[name].call()
    inputs = {**inputs, "use_cache": False} if name in ("gpt2", "llama") else inputs
    model, call = ZOO[name].model().eval(), to_call(inputs)
    fast, sites = product_of(model, inputs)
    assert {s.kernel for s in sites} == {"structc"}
    with torch.no_grad():
        calls = ops.call_count()
        got = fast(*call.args, **call.kwargs)
        assert ops.call_count() == calls + len(sites)
        want = model(*call.args, **call.kwargs)
    for a, b in zip(floating(got), floating(want), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def floating(output: Any) -> list[Tensor]:
    """The floating tensors of an output."""
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def always_faster(*args: Any, **kwargs: Any) -> dict[str, Timed]:
    """As if the emitted kernel were the fastest."""
    calls = args[0]
    return {n: Timed(1.0 if n == "structc" else 2.0, 1.0, 0.0, 3) for n in calls}


@pytest.mark.parametrize("f", [with_bias, bias_a_head_in_three, documents, capped])
def test_every_case_is_held_against_the_reference(
    f: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("structc.codegen.attention_price.interleaved", always_faster)
    sites = detect(capture(Spelled(f).eval(), to_call(floats(2, 9, H * D)))).attention
    (case,) = (a.case for a in sites if a.case)
    assert isinstance(attention_price.price([case], effort="quick")[case], Price)


@pytest.mark.parametrize("f", [scaled_first, with_bias])
def test_a_saved_product_has_its_attention(
    f: Callable[..., Tensor], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("structc.codegen.attention_price.interleaved", always_faster)
    model, x = Spelled(f).eval(), floats(2, 9, H * D)
    cases = [a.case for a in detect(capture(model, to_call(x))).attention if a.case]
    attention_price.price(cases, effort="quick")  # known from then on
    fast = structc.compile(model, x, effort="recorded")
    fast.save(tmp_path / "out")
    again = structc.load(tmp_path / "out", Spelled(f))
    (site,) = again.structc.sites.attention
    assert site.kernel == "structc"
    with torch.no_grad():
        assert torch.equal(again(x), fast(x))


def test_without_timing_attention_stays() -> None:
    fast = structc.compile(Spelled(plain).eval(), floats(2, 11, H * D), effort="none")
    (site,) = fast.structc.sites.attention
    assert not site.kernel and site.refusal is not None and "not timed" in site.refusal.reason


@pytest.mark.parametrize("name", ["float softmax", "grouped", "sink"])
def test_golden_graphs(name: str, golden: Callable[[str, str], None]) -> None:
    """What the graph was, and what it is."""
    f, kv_heads, _ = SPELLINGS[name]
    model = Spelled(f, kv_heads).eval()
    captured = capture(model, to_call(floats(2, 9, H * D)))
    before = listing(captured.regions[0].graph.graph)
    after_capture, _ = rewritten(model, floats(2, 9, H * D))
    after = listing(after_capture.regions[0].graph.graph)
    text = f"# before\n{before}\n\n# after\n{after}\n"
    golden(f"rewrite/attention-{name.replace(' ', '-')}.txt", text)


def listing(graph: torch.fx.Graph) -> str:
    """A line for each operator."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    return "\n".join(f"{n.name} = {n.target} {n.args}" for n in nodes)
