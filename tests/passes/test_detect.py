"""Detection: one weight in every spelling, what must be left alone, groups, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo import ZOO, bert, floats, ids, padded

from structc.attention_records import AttentionSite
from structc.inputs import to_call
from structc.passes.capture import capture
from structc.passes.detect import detect
from structc.passes.detect_attention import classify_mask
from structc.records import Sites

N, M = 6, 10


def sites_of(model: nn.Module, inputs: Any) -> Sites:
    return detect(capture(model.eval(), to_call(inputs)))


class Spelled(nn.Module):
    """``f(x, W, b)`` with the weight stored (out, in), or (in, out) where asked for."""

    def __init__(self, f: Callable[..., Tensor], shape: tuple[int, ...] = (M, N)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(M))
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, self.weight, self.bias)


OUT_IN, IN_OUT = (M, N), (N, M)
SPELLINGS: dict[str, tuple[Callable[..., Tensor], tuple[int, int], bool]] = {
    # the spelling, how the weight is stored, whether the bias is part of the product
    "linear": (lambda x, w, b: F.linear(x, w), OUT_IN, False),
    "linear-bias": (lambda x, w, b: F.linear(x, w, b), OUT_IN, True),
    "linear-of-transposed": (lambda x, w, b: F.linear(x, w.t(), b), IN_OUT, True),
    "matmul": (lambda x, w, b: x @ w, IN_OUT, False),
    "matmul-T": (lambda x, w, b: x @ w.T, OUT_IN, False),
    "matmul-mT-plus": (lambda x, w, b: torch.matmul(x, w.mT) + b, OUT_IN, False),
    "matmul-transpose": (lambda x, w, b: x @ w.transpose(0, 1), OUT_IN, False),
    "matmul-transpose-negative": (lambda x, w, b: x @ w.transpose(-1, -2), OUT_IN, False),
    "matmul-permute": (lambda x, w, b: x @ w.permute(1, 0), OUT_IN, False),
    "matmul-twice-transposed": (lambda x, w, b: x @ w.t().t(), IN_OUT, False),
    "mm": (lambda x, w, b: torch.mm(x.view(-1, N), w), IN_OUT, False),
    "addmm": (lambda x, w, b: torch.addmm(b, x.view(-1, N), w), IN_OUT, True),
    "addmm-t": (lambda x, w, b: torch.addmm(b, x.view(-1, N), w.t()), OUT_IN, True),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spellings_of_one_product(spelling: Any) -> None:
    f, shape, bias = spelling
    (site,) = sites_of(Spelled(f, shape), floats(2, 5, N)).linear
    assert (site.in_features, site.out_features, site.rows) == (N, M, 10)
    assert site.transposed == (shape == IN_OUT)
    assert (site.name, site.module, site.weight) == ("weight", "", "weight")
    assert site.bias == ("bias" if bias else None)
    assert "functional" in site.tags and len(site.nodes) == 1


LEFT_ALONE: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "computed-weight": (lambda x, w, b: F.linear(x, 2 * w), OUT_IN),
    "sliced-weight": (lambda x, w, b: F.linear(x, w[1:]), OUT_IN),
    "reshaped-weight": (lambda x, w, b: x @ w.reshape(N, M), OUT_IN),
    "weight-on-the-left": (lambda x, w, b: w @ x.mT, OUT_IN),
    "two-constants": (lambda x, w, b: x.sum() + w @ w.T, OUT_IN),
    "addmm-alpha": (lambda x, w, b: torch.addmm(b, x.view(-1, N), w, alpha=2), IN_OUT),
    "addmm-beta": (lambda x, w, b: torch.addmm(b, x.view(-1, N), w, beta=0.5), IN_OUT),
    "vector": (lambda x, w, b: x @ w, (N,)),
    "batched-weight": (lambda x, w, b: x @ w, (2, N, M)),
    "data-times-data": (lambda x, w, b: x @ x.mT, OUT_IN),
}


@pytest.mark.parametrize("case", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_what_is_no_constant_product_is_left_alone(case: Any) -> None:
    f, shape = case
    assert sites_of(Spelled(f, shape), floats(2, 5, N)).linear == ()


def test_bias_that_is_no_vector_is_not_folded() -> None:
    model = Spelled(lambda x, w, b: torch.addmm(x[0, :1] @ w, x.view(-1, N), w), IN_OUT)
    assert all(s.bias is None for s in sites_of(model, floats(2, 5, N)).linear)


# ---------------------------------------------------------------------------- modules


def test_modules_and_their_activations() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 8),
        nn.SiLU(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(),
        nn.Linear(8, 2, bias=False),
    )  # fmt: skip
    sites = sites_of(model, floats(3, 4)).linear
    assert [s.activation for s in sites] == ["gelu", "gelu_tanh", "silu", "relu", "", ""]
    assert [s.name for s in sites] == ["0", "2", "4", "6", "8", "10"]
    assert [s.bias for s in sites][-2:] == ["8.bias", None]


def test_an_activation_with_two_readers_before_it_is_not_taken() -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return F.gelu(y) + y

    (site,) = sites_of(TwoReaders(), floats(3, 4)).linear
    assert site.activation == ""


def test_conv1d_is_a_linear_layer_stored_transposed() -> None:
    case = ZOO["gpt2-no-cache"]
    sites = {s.name: s for s in sites_of(case.model(), case.call()).linear}
    packed = sites["transformer.h.0.attn.c_attn"]
    assert (packed.in_features, packed.out_features, packed.transposed) == (32, 96, True)
    assert packed.bias == "transformer.h.0.attn.c_attn.bias" and len(packed.nodes) == 1
    assert sites["transformer.h.0.mlp.c_fc"].activation == ""  # a tanh GELU spelled out
    assert "tied" in sites["lm_head"].tags and not sites["lm_head"].transposed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_left_alone(value: float) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    model[0].weight.data[3, 3] = value
    found = sites_of(model, floats(3, 6))
    assert [s.name for s in found.linear] == ["1"]
    assert [(r.site, r.code) for r in found.refusals] == [("0", "NONFINITE")]


def test_packed_projection_of_multihead_attention() -> None:
    sites = {s.name: s for s in sites_of(ZOO["encoder"].model(), floats(2, 7, 32)).linear}
    packed = sites["layers.0.self_attn.in_proj_weight"]
    assert (packed.in_features, packed.out_features) == (32, 96)
    assert packed.bias == "layers.0.self_attn.in_proj_bias" and "functional" in packed.tags
    assert sites["layers.0.linear1"].activation == "relu"
    assert set(sites) == {
        "layers.0.self_attn.in_proj_weight",
        "layers.0.self_attn.out_proj.weight",
        "layers.0.linear1",
        "layers.0.linear2",
    }


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))


def test_tied_weights_are_marked() -> None:
    sites = {s.name: s for s in sites_of(Tied(), torch.arange(6).view(2, 3)).linear}
    assert sites["head"].tags == {"tied"} and sites["body"].tags == frozenset()


def test_views_of_one_storage_are_tied() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            whole = torch.randn(8, 4)
            self.a.weight, self.b.weight = nn.Parameter(whole[:4]), nn.Parameter(whole[4:])

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    assert all("tied" in s.tags for s in sites_of(Views(), floats(3, 4)).linear)


def test_one_module_called_twice_is_one_site_with_two_uses() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Tanh())
    (site,) = sites_of(model, floats(3, 4)).linear
    assert (site.module, site.weight, site.bias) == ("0", "0.weight", "0.bias")
    assert len(site.nodes) == 2 and site.activation == "" and site.tags == frozenset()


def test_two_layers_with_one_weight_keep_their_own_biases() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    sites = {s.name: s for s in sites_of(Pair(), floats(3, 4)).linear}
    assert set(sites) == {"a", "b"} and all(s.tags == {"tied"} for s in sites.values())
    assert [sites[n].bias for n in "ab"] == ["a.bias", "b.bias"]
    assert [len(sites[n].nodes) for n in "ab"] == [1, 1]
    assert [sites[n].activation for n in "ab"] == ["relu", ""]


TWICE: dict[str, Callable[..., Tensor]] = {
    "both-orientations": lambda x, w, b: F.relu(x @ w) @ w.T,
    "with-and-without-bias": lambda x, w, b: F.linear(F.linear(x, w, b), w),
    "layer-and-its-transpose": lambda x, w, b: F.linear(F.linear(x, w), w.t()),
}


@pytest.mark.parametrize("f", TWICE.values(), ids=TWICE.keys())
def test_a_weight_used_in_two_ways_is_refused(f: Callable[..., Tensor]) -> None:
    model = Spelled(f, (4, 4))
    model.bias = nn.Parameter(torch.randn(4))
    sites = sites_of(model, floats(3, 4))
    assert sites.linear == ()
    assert [(r.site, r.code) for r in sites.refusals] == [("weight", "MIXED")]


def test_a_layer_whose_weight_is_read_elsewhere_is_refused() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(self.encode(x)), self.encode.weight.t())

    sites = sites_of(Autoencoder(), floats(3, 4))
    assert sites.linear == () and [r.code for r in sites.refusals] == ["MIXED"]


def test_constants_that_are_no_parameters_are_left_alone() -> None:
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("moving", torch.randn(4, 4))
            self.plain = torch.randn(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.shift = torch.randn(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x @ self.moving @ self.plain, self.weight, self.shift)

    assert sites_of(Constants(), floats(3, 4)).linear == ()


# ---------------------------------------------------------------------------- refusals


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def hooked() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


class Subclassed(torch.Tensor):
    pass


def quantised() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Subclassed))
    return layer


REFUSED = {
    "hooks": (hooked, "HOOKS"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "PARAMETRIZED"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "PARAMETRIZED"),
    "own-forward": (lambda: OwnForward(4, 4), "SUBCLASS"),
    "tensor-subclass": (quantised, "QUANTIZED"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_layers_that_a_rewrite_would_break_are_refused(case: Any) -> None:
    make, code = case
    sites = sites_of(nn.Sequential(make(), nn.ReLU(), nn.Linear(4, 4)), floats(3, 4))
    assert [s.name for s in sites.linear] == ["2"]
    (refusal,) = sites.refusals
    assert (refusal.site, refusal.family, refusal.code) == ("0", "detect", code)
    assert len(refusal.reason) > 20


def test_a_layer_that_the_example_does_not_reach_is_refused() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    sites = sites_of(Skips(), floats(3, 4))
    assert [s.name for s in sites.linear] == ["used"]
    assert [(r.site, r.code) for r in sites.refusals] == [("unused", "NOT_CALLED")]


def test_a_forward_put_on_the_instance_runs_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inner = model[0]
    model.forward = lambda x: inner(x) + 1  # type: ignore[method-assign]
    assert sites_of(model, floats(3, 4)).linear == ()


def test_a_functional_weight_outside_of_any_graph_is_refused_with_its_reason() -> None:
    class NoExport(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y @ self.w if float(y.sum()) > 0 else y

    assert [s.name for s in sites_of(NoExport(), floats(3, 4)).linear] == ["inner"]


# ---------------------------------------------------------------------------- groups


def test_sites_that_share_an_input_share_a_group() -> None:
    sites = {s.name: s for s in sites_of(ZOO["llama"].model(), ZOO["llama"].call()).linear}
    layer = "model.layers.0"
    qkv = {sites[f"{layer}.self_attn.{p}_proj"].group for p in "qkv"}
    gate_up = {sites[f"{layer}.mlp.{p}_proj"].group for p in ("gate", "up")}
    alone = [sites[f"{layer}.{n}_proj"].group for n in ("self_attn.o", "mlp.down")]
    assert len(qkv) == len(gate_up) == 1
    assert len({*qkv, *gate_up, *alone, sites["lm_head"].group}) == 5


def test_reshapes_that_keep_rows_apart_do_not_part_a_group() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(x, 0.1, self.training)
            return self.a(y) + self.b(y.view(-1, 4)).view_as(x) + self.c(y.view(-1, 2)).view_as(x)

    groups = {s.name: s.group for s in sites_of(Shared(), floats(3, 4)).linear}
    assert groups["a"] == groups["b"] != groups["c"]


# ---------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Hand-written or fused attention with a mask made by a function of the length."""

    def __init__(self, mask: Callable[[int], Tensor] | None, *, fused: bool, div: bool) -> None:
        super().__init__()
        self.qkv, self.mask, self.fused, self.div = nn.Linear(8, 24), mask, fused, div

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mask = None if self.mask is None else self.mask(t)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25)
        scores = q @ k.mT
        scores = scores / 4.0 if self.div else scores * 0.25
        if mask is not None:
            if self.div:
                scores = scores.masked_fill(~mask, -torch.inf)
            else:
                scores = torch.where(mask, scores, -torch.inf)
        return scores.softmax(-1) @ v


def tril(t: int) -> Tensor:
    return torch.arange(t)[:, None] >= torch.arange(t)[None]


def window(width: int) -> Callable[[int], Tensor]:
    def mask(t: int) -> Tensor:
        gap = torch.arange(t)[:, None] - torch.arange(t)[None]
        return (gap >= 0) & (gap < width)

    return mask


def prefix(t: int) -> Tensor:
    return tril(t) | (torch.arange(t)[None] < 3)


def attention_of(model: nn.Module, inputs: Any) -> AttentionSite:
    (site,) = sites_of(model, inputs).attention
    return site


def test_two_masks_are_not_one() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.bias = nn.Linear(8, 8), nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            scores = (q @ q.mT).masked_fill(~tril(5), -torch.inf) + self.bias
            return scores.softmax(-1) @ q

    assert attention_of(Both(), floats(2, 5, 8)).mask_kind == "data_dependent"


SPELLED = {"sdpa": (True, False), "mul": (False, False), "div": (False, True)}


@pytest.mark.parametrize("spelled", SPELLED.values(), ids=SPELLED.keys())
@pytest.mark.parametrize("length", [5, 8])
def test_attention_in_both_spellings(spelled: tuple[bool, bool], length: int) -> None:
    fused, div = spelled
    site = attention_of(Attention(None, fused=fused, div=div), floats(2, length, 8))
    assert site.spelling == ("sdpa" if fused else "matmul_softmax_matmul")
    assert (site.mask_kind, site.scale, site.heads, site.head_dim) == ("none", 0.25, 2, 4)
    assert site.length == length


MASKS: dict[str, tuple[Callable[[int], Tensor], int, str]] = {
    # the mask, the example's length, what it is
    "causal": (tril, 6, "causal"),
    "causal-long": (tril, 11, "causal"),
    "window": (window(3), 6, "sliding_window"),
    "window-longer-than-the-example": (window(8), 6, "sliding_window"),
    "prefix": (prefix, 6, "data_dependent"),
    "anti-causal": (lambda t: ~tril(t) | torch.eye(t, dtype=torch.bool), 6, "data_dependent"),
    "all": (lambda t: torch.ones(t, t, dtype=torch.bool), 6, "all_true"),
}


@pytest.mark.parametrize("spelled", SPELLED.values(), ids=SPELLED.keys())
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS.keys())
def test_masks_are_told_apart_by_their_values(case: Any, spelled: tuple[bool, bool]) -> None:
    (mask, length, kind), (fused, div) = case, spelled
    model = Attention(mask, fused=fused, div=div)
    assert attention_of(model, floats(2, length, 8)).mask_kind == kind


def test_is_causal_is_causal() -> None:
    class Flag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)[:, None]
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    assert attention_of(Flag(), floats(2, 5, 8)).mask_kind == "causal"


@pytest.mark.parametrize(
    "name, kind, heads, kv_heads",
    [("bert", "padding", 2, 2), ("gpt2", "causal", 2, 2), ("llama", "causal", 4, 2),
     ("vit", "all_true", 2, 2), ("encoder", "none", 2, 2)],
)  # fmt: skip
def test_attention_of_real_models(name: str, kind: str, heads: int, kv_heads: int) -> None:
    site = attention_of(ZOO[name].model(), ZOO[name].call())
    assert (site.mask_kind, site.heads, site.kv_heads) == (kind, heads, kv_heads)


def test_bert_without_padding_is_not_masked() -> None:
    assert attention_of(bert(), {"input_ids": ids(2, 7)}).mask_kind == "all_true"
    causal = bert(is_decoder=True, use_cache=False)
    assert attention_of(causal, padded(2, 6)).mask_kind in ("causal_padding", "data_dependent")
    assert attention_of(causal, {"input_ids": ids(2, 6)}).mask_kind == "causal"


def test_eager_attention_is_found_too() -> None:
    site = attention_of(bert(attn_implementation="eager"), padded(2, 7))
    assert site.spelling == "matmul_softmax_matmul"
    assert (site.heads, site.head_dim, site.scale) == (2, 16, 0.25)


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


CLASSES = {
    "causal": tril(5),
    "all_true": torch.ones(5, 5, dtype=torch.bool),
    "padding": torch.tensor([1, 1, 1, 0, 0], dtype=torch.bool).expand(5, 5),
    "causal_padding": tril(5) & torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool),
    "sliding_window": window(2)(5),
    "data_dependent": torch.eye(5, dtype=torch.bool).flip(0),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_boolean_and_additive_masks_are_classified_alike(kind: str) -> None:
    assert classify_mask(CLASSES[kind]) == kind
    assert classify_mask(CLASSES[kind].expand(2, 1, 5, 5)) == kind
    assert classify_mask(additive(CLASSES[kind])) == kind


def test_a_bias_is_no_mask() -> None:
    assert classify_mask(torch.randn(2, 1, 5, 5)) == "bias"
    assert classify_mask(torch.zeros(5, 5)) == "all_true"
    mixed = additive(tril(5)) + torch.randn(5, 5)
    assert classify_mask(mixed) == "bias", "a bias under a causal mask may not be dropped"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(0, 2**25 - 1))
def test_causal_is_said_of_the_lower_triangle_alone(rows: int, keys: int, bits: int) -> None:
    mask = torch.tensor([bool(bits >> i & 1) for i in range(rows * keys)]).view(rows, keys)
    triangle = rows == keys and torch.equal(mask, tril(rows))
    for form in (mask, additive(mask)):
        kind = classify_mask(form)
        assert (kind == "causal") == triangle
        assert (kind == "all_true") == bool(mask.all())
    both = torch.stack([tril(keys), mask]) if rows == keys else mask[None]
    assert classify_mask(both) != "causal" or triangle
