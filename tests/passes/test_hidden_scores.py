"""What hidden scores become in a graph: -inf, the lowest number, -1e9; and rows without keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from structc import ops
from structc.attend import attention
from structc.attention_records import AttentionSite
from structc.inputs import to_call
from structc.passes.capture import capture
from structc.passes.detect import detect
from structc.passes.rewrite import rewrite
from structc.softmax import NOTHING, Extras, Softmax, softmax_reference

Mask = Callable[[Tensor, Tensor], Tensor]
LOWEST = torch.finfo(torch.float32).min


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


KEYS: dict[str, tuple[Mask, str, float]] = {
    "-inf": (lambda s, m: s.masked_fill(m == 0, -torch.inf), "padding", -torch.inf),
    "-1e9": (lambda s, m: s.masked_fill(m == 0, -1e9), "padding", -1e9),
    "lowest": (lambda s, m: s.masked_fill(m == 0, LOWEST), "padding", LOWEST),
    "where": (lambda s, m: torch.where(m != 0, s, -1e4), "padding", -1e4),
    "twice": (
        lambda s, m: s.masked_fill(m == 0, -1e9).masked_fill(~causal(s.shape[-1]), -1e9),
        "causal, padding",
        -1e9,
    ),
    "causal": (lambda s, m: s.masked_fill(~causal(s.shape[-1]), -1e9), "causal", -1e9),
    "causal, lowest": (lambda s, m: s.masked_fill(~causal(s.shape[-1]), LOWEST), "causal", 0.0),
    "pairs": (
        lambda s, m: s.masked_fill((m * m.mT) == 0, -1e9), "data_dependent", -1e9,
    ),
    "added": (lambda s, m: s + torch.where(m != 0, 0.0, -torch.inf), "padding", -torch.inf),
    "scaled": (lambda s, m: s.masked_fill(m == 0, -1e9) / 2, "padding", -5e8),
}  # fmt: skip


class Masked(nn.Module):
    """Attention of two heads, masked before the softmax."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.mask = mask

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.mask(q @ k.mT * 0.35, keep[:, None, None]).softmax(-1) @ v


def inputs(batch: int, n: int, kept: float = 0.7) -> tuple[Tensor, Tensor]:
    """The second sequence is all padding."""
    keep = (torch.rand(batch, n) < kept).float()
    keep[0, 0] = 1
    keep[1:2] = 0
    return torch.randn(batch, n, 16), keep


def product_of(model: nn.Module) -> tuple[nn.Module, AttentionSite]:
    captured = capture(model.eval(), to_call(inputs(2, 20)))
    sites = detect(captured)
    (site,) = sites.attention
    assert site.refusal is None, site.refusal
    sites = replace(sites, attention=(replace(site, kernel="structc"),))
    return rewrite(captured, sites, {}).tree, site


@pytest.mark.parametrize("name", KEYS)
def test_rows_without_keys_are_as_in_the_graph(name: str) -> None:
    mask, proven, fill = KEYS[name]
    model = Masked(mask)
    product, site = product_of(model)
    assert site.proven == proven and site.case is not None
    assert Softmax.parse(site.case.form).fill == fill
    for sizes in ((2, 20), (3, 33), (2, 1)):
        call = inputs(*sizes)
        with torch.no_grad():
            calls = ops.call_count()
            got, want = product(*call), model(*call)
        assert ops.call_count() > calls
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("fill", [-1e4, -1e9, LOWEST])
@pytest.mark.parametrize("pairs", [False, True])
def test_gradients(fill: float, pairs: bool) -> None:
    """Of the operator: products run the model's own code where a gradient is wanted."""
    q = torch.randn(2, 4, 20, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 20, 8, requires_grad=True) for _ in range(2))
    _, keep = inputs(2, 20)
    keys, mask = keep != 0, keep[:, None, None] != 0
    mask = (mask & mask.mT if pairs else mask) & causal(20)
    extras = (mask, None, None) if pairs else (None, None, keys)
    form = str(Softmax(0.35, causal=not pairs, fill=fill))
    ours, _ = torch.ops.structc.attention(q, k, v, *extras, None, None, form)
    wide = (t.repeat_interleave(2, 1) for t in (k, v))
    theirs = (q @ next(wide).mT * 0.35).masked_fill(~mask, fill).softmax(-1) @ next(wide)
    for o in (ours, theirs):
        assert o.isfinite().all()
    found = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", [-1e4, -1e4 + 3, -2e4, -1e4 + 400])
def test_scores_as_low_as_hidden_ones(dtype: torch.dtype, level: float) -> None:
    """They share their row with hidden keys; what is far above does not."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.float64, generator=generator).unbind(0)
    q, k, v = (t.to(dtype).double() for t in (q, k, v))
    q[:, :, :4] = 0  # their scores are the bias alone
    bias = torch.zeros(1, 1, 9, 1, dtype=torch.float64)
    bias[:, :, :4] = level
    keys = torch.tensor([[True] * 6 + [False] * 3])
    scores = (q @ k.mT + bias).masked_fill(~keys[:, None, None], -1e4)
    want = scores.softmax(-1) @ v
    form = Softmax(1.0, fill=-1e4)
    given = [t.to(dtype) for t in (q, k, v)]
    got, _ = attention(*given, form, Extras(bias=bias.to(torch.float32), keys=keys))
    loose = 3e-2 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(got.double(), want, rtol=loose, atol=loose)


def test_gradients_of_scores_as_low_as_hidden_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64, generator=generator).unbind(0)
    keys = torch.tensor([[True] * 4 + [False] * 2])
    form = str(Softmax(1.0, fill=-1.5))

    def ours(*given: Tensor) -> Tensor:
        o, _ = torch.ops.structc.attention(*given, None, None, keys, None, None, form)
        return o

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~keys, -1.5).softmax(-1) @ v

    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.testing.assert_close(ours(*leaves), theirs(*leaves))
    assert torch.autograd.gradcheck(ours, leaves)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_rows_without_keys_beside_a_bias(compiled: bool) -> None:
    """A bias of -inf hides a key more surely than -1e9 does; compiled, one that is learnt."""
    q, k, v = (torch.randn(1, 1, 6, 4, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 1, 1, 6, requires_grad=compiled)
    if not compiled:
        bias[..., 0] = -torch.inf
    form = str(Softmax(1.0, fill=-1e9))
    for keys in (torch.zeros(1, 6, dtype=torch.bool), torch.tensor([[True] + [False] * 5])):

        def ours(*given: Tensor) -> Tensor:
            return torch.ops.structc.attention(*given, None, keys, None, None, form)[0]  # noqa: B023

        run = torch.compile(ours, backend="aot_eager") if compiled else ours
        scores = (q @ k.mT + bias).masked_fill(~keys, -1e9)
        grads = [
            torch.autograd.grad(o.square().sum(), (q, k, v))
            for o in (run(q, k, v, bias), scores.softmax(-1) @ v)
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_number_that_something_is_added_to_hides_nothing_for_sure() -> None:
    model = Masked(lambda s, m: s.masked_fill(m == 0, -1e4) + 2 * m)
    captured = capture(model.eval(), to_call(inputs(2, 20)))
    (site,) = detect(captured).attention
    assert site.refusal is not None and site.refusal.code == "MASK"


def test_hidden_scores_of_several_kinds_are_refused() -> None:
    model = Masked(lambda s, m: s.masked_fill(m == 0, -1e9).masked_fill(m > 3, -1e5))
    captured = capture(model.eval(), to_call(inputs(2, 20)))
    (site,) = detect(captured).attention
    assert site.refusal is not None and site.refusal.code == "MASK"


def test_rows_without_keys_are_zero_where_nothing_is_said() -> None:
    q = torch.randn(1, 1, 3, 8)
    keys = torch.zeros(1, 3, dtype=torch.bool)
    for fill, want in ((0.0, 0.0), (-torch.inf, torch.nan), (-1e9, None)):
        o, lse = softmax_reference(q, q, q, Softmax(1.0, fill=fill), Extras(keys=keys))
        assert (lse == -torch.inf).all()
        expected = (
            q.mean(2, keepdim=True).expand_as(q) if want is None else torch.full_like(q, want)
        )
        torch.testing.assert_close(o, expected, equal_nan=True)
    assert softmax_reference(q, q, q, Softmax(1.0, fill=-1e9), NOTHING)[0].isfinite().all()
