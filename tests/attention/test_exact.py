"""``structc.attention.exact``: every mask against PyTorch, gradients, edges and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from structc import attend, ops
from structc.attention import exact
from structc.errors import ConfigError
from structc.numerics import relative_error
from structc.softmax import Extras, Softmax, softmax_reference


def qkv(
    n: int = 70,
    m: int = 70,
    *,
    heads: int = 4,
    kv_heads: int = 4,
    d: int = 16,
    batch: int = 2,
    **to: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, heads, n, d, **to)
    k, v = (torch.randn(batch, kv_heads, m, d, **to) for _ in range(2))
    return q, k, v


def seen(n: int, m: int, **kw: Any) -> Tensor:
    """The boolean mask that the arguments of exact speak of, built in full."""
    i, j = torch.arange(n)[:, None] + kw.get("causal_offset", 0), torch.arange(m)[None]
    mask = torch.ones(n, m, dtype=torch.bool)
    window = kw.get("window")
    if window is not None:
        mask = j > i - window
        if not kw.get("is_causal"):
            mask = mask & (j < i + window)
        mask = mask | (j < kw.get("sinks", 0))
    return mask & (j <= i) if kw.get("is_causal") else mask


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_offset": 40},
    "some rows see nothing": {"is_causal": True, "causal_offset": -9},
    "window": {"is_causal": True, "window": 13},
    "sinks": {"is_causal": True, "window": 13, "sinks": 3},
    "two-sided": {"window": 9},
    "two-sided, sinks": {"window": 9, "sinks": 20},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n", "m"), [(70, 70), (1, 33), (130, 170)])
def test_masks_are_what_they_say(mask: str, n: int, m: int, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in qkv(n, m))
    kw = MASKS[mask]
    y, lse = exact(q, k, v, return_lse=True, **kw)
    full = seen(n, m, **kw)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=full)
    want = want.masked_fill(~full.any(-1)[:, None], 0)
    scores = (q.double() @ k.double().mT / 4).masked_fill(~full, -math.inf)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    assert y.dtype == dtype and relative_error(y, want) < limit
    assert relative_error(lse, scores.logsumexp(-1)) < max(limit, 1e-7)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_are_those_of_autograd(mask: str) -> None:
    form = {k: v for k, v in MASKS[mask].items() if k in ("window", "sinks")}
    rule = Softmax(
        0.3, "is_causal" in MASKS[mask], MASKS[mask].get("causal_offset", 0),
        form.get("window", 0), form.get("sinks", 0), 3.0,
    )  # fmt: skip
    q, k, v = qkv(40, 50, kv_heads=2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grads = torch.randn(2, 4, 40, 16).double(), torch.randn(2, 4, 40).double()
    outputs = []
    for f in (attend.attention, softmax_reference):
        o, lse = f(*leaves, rule, Extras())
        dead = lse.detach() == -math.inf
        given = torch.autograd.grad((o, lse), leaves, (grads[0], grads[1].masked_fill(dead, 0)))
        outputs.append(given)
    for got, want in zip(*outputs, strict=True):
        assert relative_error(got, want) < 1e-12


def test_the_gradient_in_float32_uses_the_kernels_sums() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(100, 100))
    exact(q, k, v, is_causal=True, window=20).square().sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    full = seen(100, 100, is_causal=True, window=20)
    F.scaled_dot_product_attention(*wide, attn_mask=full).square().sum().backward()
    for t, w in zip((q, k, v), wide, strict=True):
        assert relative_error(t.grad, w.grad) < 1e-5


def test_a_gradient_of_the_gradient() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(5, 6, heads=2, kv_heads=1, d=3, dtype=torch.float64))
    bias = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)

    def f(*a: Tensor) -> Tensor:
        return exact(*a[:3], bias=a[3], window=4, enable_gqa=True)

    torch.autograd.gradcheck(f, (q, k, v, bias))
    torch.autograd.gradgradcheck(f, (q, k, v, bias))


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_a_gradient_of_the_gradient_of_one(asked: int) -> None:
    """Row sums have none if only v wants one."""
    given = list(qkv(5, 6, heads=2, kv_heads=1, d=3, dtype=torch.float64))

    def f(x: Tensor) -> Tensor:
        q, k, v = [*given[:asked], x, *given[asked + 1 :]]
        return exact(q, k, v, enable_gqa=True).square()

    torch.autograd.gradgradcheck(f, (given[asked].clone().requires_grad_(),))


def test_gradients_of_gradients_where_q_k_and_v_are_one() -> None:
    x = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)

    def plain(x: Tensor) -> Tensor:
        return (x @ (2 * x).mT * 3**-0.5).softmax(-1) @ (x + 1)

    def ours(x: Tensor) -> Tensor:
        return exact(x, 2 * x, x + 1)

    found = []
    for f in (ours, plain):
        (grad,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        found.append((grad, *torch.autograd.grad(grad.square().sum(), x)))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 1e-10


def test_the_operator_passes_opcheck() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(20, 24, kv_heads=2))
    form = str(Softmax(0.25, causal=True, offset=4, window=9, sinks=2))
    for extras in (Extras(), Extras(bias=torch.randn(1, 4, 20, 1), sink=torch.zeros(4))):
        torch.library.opcheck(torch.ops.structc.attention.default, (q, k, v, *extras, form))


def test_a_traced_gradient_is_one_operator() -> None:
    """So that it runs on whatever computes gradients of attention where it runs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    f = torch.compile(
        lambda q, k, v: exact(q, k, v, is_causal=True, window=5, sinks=1).square(),
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
    )
    given = [t.requires_grad_() for t in qkv(9, 9)]
    f(*given).sum().backward()
    assert any("structc.attention_backward" in str(n.target) for n in graphs[1].graph.nodes)
    plain = [t.detach().requires_grad_() for t in given]
    exact(*plain, is_causal=True, window=5, sinks=1).square().sum().backward()
    for a, b in zip(given, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_traced_gradient_knows_rows_that_see_little() -> None:
    """Rows whose seen scores come near the fill go through the reference, traced or not."""
    q, k, v = qkv(9, 9, batch=1)
    form = Softmax(1.0, causal=True, fill=-5.0)
    q[:, :, 4] *= 30

    def gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            o, _ = attend.attention(leaves[0], leaves[1], leaves[2], form)
        return torch.autograd.grad(o, leaves[:1], 2 * o.detach())[0]

    graph = make_fx(gradient, tracing_mode="fake")(q, k, v)
    assert any("attention_backward" in str(node.target) for node in graph.graph.nodes)
    with torch.enable_grad():
        torch.testing.assert_close(graph(q, k, v), gradient(q, k, v))


def test_a_traced_gradient_has_none_and_says_so() -> None:
    q, k, v = qkv(9, 9, batch=1)
    slope = torch.ops.structc.attention_backward
    given = [t.requires_grad_() for t in (q, k, v)]
    o, lse = (t.detach() for t in attend.attention(*given, Softmax(0.3, causal=True)))
    none = [None] * 5
    dq, *_ = slope(*given, *none, o, lse, o, lse, str(Softmax(0.3, causal=True)))
    with pytest.raises(NotImplementedError, match="second gradient"):
        dq.sum().backward()


def test_torch_compile_takes_it() -> None:
    q, k, v = qkv()
    f = torch.compile(lambda q, k, v: exact(q, k, v, is_causal=True) * 2, backend="aot_eager")
    assert torch.allclose(f(q, k, v), 2 * exact(q, k, v, is_causal=True), atol=1e-6)


def test_padding_may_hold_anything() -> None:
    q, k, v = qkv()
    lengths = torch.tensor([70, 33])
    full = torch.arange(70)[None, None, None] < lengths[:, None, None, None]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=full)
    k[1, :, 33:], v[1, :, 33:] = math.nan, math.inf
    y = exact(q, k, v, key_lengths=lengths)
    assert torch.allclose(y, want, atol=1e-5)
    assert not exact(q, k, v, key_lengths=torch.tensor([0, 0])).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_query_does_not_see_does_not_reach_it(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    want = exact(q, k, v, is_causal=True)
    k[:, :, 40], v[:, :, 40] = math.nan, math.nan
    y = exact(q, k, v, is_causal=True)
    assert torch.allclose(y[:, :, :40], want[:, :, :40], atol=1e-6) and y[:, :, 40:].isnan().all()
    k[:, :, 40], v[:, :, 40] = 0, math.inf
    y = exact(q, k, v, is_causal=True)
    assert torch.allclose(y[:, :, :40], want[:, :, :40], atol=1e-6) and y[:, :, 40:].isinf().all()


def test_groups_share_their_keys() -> None:
    q, k, v = qkv(50, 50, heads=6, kv_heads=2)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(exact(q, k, v, is_causal=True, enable_gqa=True), want, atol=1e-5)
    one = exact(q[:, :, -1:], k, v, enable_gqa=True)
    assert torch.allclose(one, want[:, :, -1:], atol=1e-5)


def test_blocks() -> None:
    q, k, v = qkv(100, 130)
    blocks = torch.rand(2, 4, 5, 5) < 0.5
    blocks[..., 0] = True
    full = blocks.repeat_interleave(20, 2).repeat_interleave(30, 3)[..., :130]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=full)
    assert torch.allclose(exact(q, k, v, block_mask=(blocks, (20, 30))), want, atol=1e-5)
    causal = full & seen(100, 130, is_causal=True)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
    y = exact(q, k, v, block_mask=(blocks, (20, 30)), is_causal=True)
    assert torch.allclose(y, want, atol=1e-5)


def test_biases_of_every_shape() -> None:
    q, k, v = qkv(60, 80)
    for shape in ((60, 80), (4, 1, 80), (2, 1, 60, 80), (1, 1, 60, 1)):
        bias = torch.randn(shape)
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(2, 4, 60, 80))
        assert torch.allclose(exact(q, k, v, bias=bias), want, atol=1e-5)
    lags = torch.randn(4, 60 + 80 - 1)
    index = torch.arange(60)[:, None] - torch.arange(80)[None] + 79
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=lags[:, index].expand(2, 4, 60, 80))
    assert torch.allclose(exact(q, k, v, bias=lags), want, atol=1e-5)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=lags[0, index].expand(2, 4, 60, 80))
    assert torch.allclose(exact(q, k, v, bias=lags[0]), want, atol=1e-5)
    hidden = torch.full((60, 80), -math.inf).triu(1)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(exact(q, k, v, bias=hidden), want, atol=1e-5)
    assert torch.allclose(exact(q, k, v, bias=hidden == 0), want, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_bias_of_another_dtype(dtype: torch.dtype, other: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in qkv())
    bias = torch.randn(70, 70).to(other)
    want = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), attn_mask=bias.double())
    assert relative_error(exact(q, k, v, bias=bias), want) < (
        1e-2 if dtype == torch.bfloat16 else 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_lowest_numbers_sees_all_keys_alike(dtype: torch.dtype) -> None:
    """What Hugging Face's added masks do to a query of padding."""
    q, k, v = (t.requires_grad_() for t in qkv(dtype=dtype))
    bias = torch.zeros(70, 70, dtype=dtype)
    bias[3] = torch.finfo(dtype).min
    bias[4, 5:] = torch.finfo(dtype).min
    bias[5] = -math.inf
    y = exact(q, k, v, bias=bias)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert torch.allclose(y, want, atol=1e-5) and torch.allclose(y[:, :, 3], v.mean(2), atol=1e-5)
    (got,) = torch.autograd.grad(y.square().sum(), v)
    plain = (q @ k.mT / 4 + bias).softmax(-1).nan_to_num(0) @ v  # PyTorch's operator errs here
    (true,) = torch.autograd.grad(plain.square().sum(), v)
    assert relative_error(got, true) < 1e-5


def test_sinks_that_meet_no_value() -> None:
    q, k, v = qkv()
    logits = torch.randn(4)
    scores = torch.cat([q @ k.mT / 4, logits[None, :, None, None].expand(2, 4, 70, 1)], -1)
    y, lse = exact(q, k, v, sink_logits=logits, return_lse=True)
    assert torch.allclose(y, scores.softmax(-1)[..., :-1] @ v, atol=1e-5)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)


def test_softcap_and_scale() -> None:
    q, k, v = qkv()
    scores = 2.0 * torch.tanh(-0.7 * (q @ k.mT) / 2.0)
    y = exact(q, k, v, scale=-0.7, softcap=2.0)
    assert torch.allclose(y, scores.softmax(-1) @ v, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    b, n, m = shape
    q, k, v = qkv(n, m, batch=b)
    y, lse = exact(q, k, v, return_lse=True)
    assert y.shape == q.shape and lse.shape == q.shape[:3] and not y.any()


@pytest.mark.parametrize("extra", ["none", "bias", "sink"])
def test_gradients_without_queries(extra: str) -> None:
    """Nothing is computed of anything, and its gradient is 0."""
    q, k, v = (t.requires_grad_() for t in qkv(0, 5))
    heads = q.shape[1]
    more = {"bias": torch.randn(1, heads, 1, 5), "sink_logits": torch.randn(heads)}
    given = {n: t.requires_grad_() for n, t in more.items() if n.startswith(extra)}
    exact(q, k, v, **given).sum().backward()
    for t in (q, k, v, *given.values()):
        assert t.grad is not None and not t.grad.any()


@pytest.mark.parametrize("d", [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 96, 127, 129, 200, 257])
def test_every_head_dim(d: int) -> None:
    q, k, v = torch.randn(3, 1, 2, 70, d).unbind(0)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(exact(q, k, v, is_causal=True), want, atol=2e-5)


def test_strides_and_threads() -> None:
    base = torch.randn(3, 2, 90, 4, 16)
    q, k, v = (t.transpose(1, 2) for t in base)
    want = exact(*(t.contiguous() for t in (q, k, v)), is_causal=True)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert torch.equal(exact(q, k, v, is_causal=True), want)
    finally:
        torch.set_num_threads(threads)
    odd = torch.randn(2, 4, 90, 32)[..., ::2]
    assert torch.allclose(exact(odd, k, v), exact(odd.contiguous(), k, v))


def test_without_kernels_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    want = exact(q, k, v, is_causal=True, window=20)
    monkeypatch.setenv("STRUCTC_NATIVE", "0")
    attend.forget()
    assert attend.kernel_for("cpu", torch.float32) is None
    calls = ops.call_count()
    assert torch.allclose(exact(q, k, v, is_causal=True, window=20), want, atol=1e-5)
    assert ops.call_count() == calls + 1
    attend.forget()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"window": 0}, "at least itself"),
        ({"sinks": 4}, "no window"),
        ({"sinks": -1, "window": 4}, "no number of keys"),
        ({"causal_offset": 3}, "neither"),
        ({"bias": torch.zeros(3, 5)}, "neither a mask"),
        ({"bias": torch.zeros(70, 70, dtype=torch.int64)}, "boolean or floating"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, "whole number"),
        ({"key_lengths": torch.tensor([1, 71])}, "outside"),
        ({"block_mask": torch.ones(2, 2).bool()}, "size of a block"),
        ({"block_mask": (torch.ones(2, 2).bool(), 16)}, "expected boolean"),
        ({"block_mask": (torch.ones(1, 1).bool(), 0)}, "blocks of 0"),
        ({"sink_logits": torch.zeros(3)}, "one a head"),
    ],
)
def test_mistakes_are_told(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        exact(*qkv(), **change)


def test_one_query_and_a_bias_that_may_be_either() -> None:
    q, k, v = qkv(1, 6)
    with pytest.raises(ConfigError, match="a value a key or a value a lag"):
        exact(q, k, v, bias=torch.arange(6.0))
    keys, lags = torch.randn(1, 6), torch.randn(4, 6)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
    assert torch.allclose(exact(q, k, v, bias=keys), want, atol=1e-5)
    want = F.scaled_dot_product_attention(
        q, k, v, attn_mask=lags.flip(1)[None, :, None].expand(2, 4, 1, 6)
    )
    assert torch.allclose(exact(q, k, v, bias=lags), want, atol=1e-5)
    with pytest.raises(ConfigError, match="values of lags"):
        exact(*qkv(), bias=torch.ones(139).bool())


def test_shapes_that_do_not_fit_are_told() -> None:
    q, k, v = qkv()
    with pytest.raises(ConfigError, match="enable_gqa"):
        exact(q, k[:, :2], v[:, :2])
    with pytest.raises(ConfigError, match="evenly"):
        exact(q, k[:, :3], v[:, :3], enable_gqa=True)
    with pytest.raises(ConfigError, match="do not agree"):
        exact(q, k[:, :, :5], v)
    with pytest.raises(ConfigError, match="one floating dtype"):
        exact(q, k.double(), v)
    with pytest.raises(ConfigError, match="batch, heads, length"):
        exact(q[0], k[0], v[0])
    with pytest.raises(RuntimeError, match="takes keys of"):
        torch.ops.structc.attention(
            q, k, v, None, None, torch.ones(2, 3).bool(), None, None, str(Softmax(1.0))
        )
