"""Heads of one attention by different methods: text, operator, lengths, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structc.attention import METHODS, Monarch, Polynomial, Uniform, WindowSinks, exact
from structc.attention.by_head import HeadGroup, by_head, groups_of, method_of, method_text, text_of
from structc.errors import InternalError
from structc.softmax import Softmax

FORM = Softmax(0.25, causal=True)
GROUPS = (
    HeadGroup(WindowSinks(16, 2, scale=0.25), (0, 3), 64, 256),
    HeadGroup(Uniform(is_causal=True), (1,), 100, 300),
)


def inputs(n: int, heads: int = 4, kv: int = 2, dtype: torch.dtype = torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(2, heads, n, 8, generator=generator, dtype=dtype)
    k, v = torch.randn(2, 2, kv, n, 8, generator=generator, dtype=dtype).unbind(0)
    return q, k, v


def wide(t: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(2, 1)


def test_what_is_written_is_read_again() -> None:
    assert groups_of(text_of(GROUPS)) == GROUPS


@given(
    st.sampled_from(
        [
            WindowSinks(5, 1, is_causal=False, scale=0.3),
            Monarch(7, 3, extra=1),
            Polynomial(3, 0.7, center=True),
            *(Uniform(is_causal=c) for c in (True, False)),
        ]
    )
)
def test_a_method_is_its_text(method: object) -> None:
    assert method_of(method_text(method)) == method  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "window_sinks(window=4)",
        "window_sinks(window=4)@1..2:",
        "nothing(window=4)@1..2:0",
        "window_sinks(window=0)@1..2:0",
        "window_sinks(__import__('os'))@1..2:0",
        "window_sinks(window=open('x'))@1..2:0",
        "uniform()@1..2:0;uniform()@1..2:0",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InternalError):
        groups_of(text)


@pytest.mark.parametrize("n", [64, 100, 256, 257, 300])
def test_each_head_is_its_methods(n: int) -> None:
    q, k, v = inputs(n)
    got = by_head(q, k, v, None, FORM, text_of(GROUPS))
    want = exact(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    for group in GROUPS:
        if group.least <= n <= group.most:
            at = list(group.heads)
            want[:, at] = group.method(q[:, at], wide(k)[:, at], wide(v)[:, at])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("n", [0, 1, 63, 301])
def test_other_lengths_are_exact(n: int) -> None:
    q, k, v = inputs(n)
    got = by_head(q, k, v, None, FORM, text_of(GROUPS))
    torch.testing.assert_close(got, exact(q, k, v, is_causal=True, scale=0.25, enable_gqa=True))


def test_padding_and_other_keys_are_exact() -> None:
    q, k, v = inputs(128)
    keys = torch.arange(128)[None] < torch.tensor([[128], [90]])
    got = by_head(q, k, v, keys, FORM, text_of(GROUPS))
    masks = {"is_causal": True, "scale": 0.25, "enable_gqa": True}
    torch.testing.assert_close(got, exact(q, k, v, key_lengths=keys.sum(1), **masks))
    some = by_head(q[:, :, :70], k, v, None, FORM, text_of(GROUPS))
    torch.testing.assert_close(some, exact(q[:, :, :70], k, v, **masks))
    all_seen = by_head(q, k, v, torch.ones(1, 128, dtype=torch.bool), FORM, text_of(GROUPS))
    torch.testing.assert_close(all_seen, by_head(q, k, v, None, FORM, text_of(GROUPS)))


def test_scores_past_what_was_verified_are_exact() -> None:
    q, k, v = inputs(80)
    bound = 1.01 * 0.25 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    text = text_of([HeadGroup(Polynomial(2, bound, True, scale=0.25), (0, 1, 2, 3), 1, 99)])
    here = by_head(q, k, v, None, FORM, text)
    assert not torch.allclose(here, by_head(q, k, v, None, FORM, "uniform()@100..200:0"))
    far = by_head(2 * q, k, v, None, FORM, text)
    want = exact(2 * q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(far, want)


def test_heads_that_are_not_there_are_an_error() -> None:
    q, k, v = inputs(80)
    with pytest.raises(RuntimeError, match="heads past 4"):
        by_head(q, k, v, None, FORM, "uniform()@1..100:4")


def test_the_operator_is_a_good_one() -> None:
    q, k, v = inputs(70, dtype=torch.float32)
    q.requires_grad_()
    arguments = (q, k, v, None, str(FORM), text_of(GROUPS))
    torch.library.opcheck(torch.ops.structc.attention_by_head.default, arguments)


def test_gradients_are_those_of_the_methods() -> None:
    q, k, v = (t[:1, :, :5].requires_grad_() for t in inputs(5))
    text = "window_sinks(window=3,scale=0.25)@1..20:0;uniform(is_causal=True)@1..20:2"

    def run(*given: torch.Tensor) -> torch.Tensor:
        return torch.ops.structc.attention_by_head(*given, None, str(FORM), text)

    assert torch.autograd.gradcheck(run, (q, k, v))
    assert torch.autograd.gradgradcheck(run, (q, k, v), atol=1e-4)


@pytest.mark.parametrize("heads", ["0", "0,1,2,3"])
@pytest.mark.parametrize("asked", [(0,), (2,), (0, 1, 2)])
def test_gradients_of_what_wants_one(heads: str, asked: tuple[int, ...]) -> None:
    """Also where no method looks at it: then it is 0."""
    text, given = f"uniform(is_causal=True)@1..20:{heads}", inputs(5)
    leaves = [given[i].requires_grad_() for i in asked]
    for create in (False, True):
        o = torch.ops.structc.attention_by_head(*given, None, str(FORM), text)
        found = torch.autograd.grad(o.square().sum(), leaves, create_graph=create)
        for at, grad in zip(asked, found, strict=True):
            assert grad.shape == given[at].shape
            assert bool(grad.any()) == (at == 2 or heads == "0")


def test_every_method_says_what_it_proposes_or_why_not() -> None:
    from structc.attention.stats import StatsSum
    from structc.records import Refusal

    for causal in (True, False):
        total = StatsSum()
        q, k, _ = inputs(300, 4, 4)
        total.add(q, k, scale=0.25, is_causal=causal)
        for stats in total.pooled():
            for kind in METHODS:
                made = kind.proposals(stats)
                if isinstance(made, Refusal):
                    assert made.reason and made.family == kind.name
                else:
                    assert made and all(type(m) is kind for m in made)
                    assert all(getattr(m, "is_causal", causal) == causal for m in made)
