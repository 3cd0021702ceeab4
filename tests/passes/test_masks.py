"""Masks are proven from the graph, and never from values at some lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import ZOO, bert, floats, ids, padded

from structc.inputs import to_call
from structc.passes.capture import capture
from structc.passes.masks import seen_by
from structc.passes.rewrite_attention import Planned, planned
from structc.passes.visibility import rule_of
from structc.records import Refusal
from structc.softmax import Softmax


class Masked(nn.Module):
    """Attention of q = k = v = x under a mask that is made from x."""

    def __init__(self, mask: Callable[[Tensor], Tensor | None], spelled: bool = False) -> None:
        super().__init__()
        self.mask, self.spelled = mask, spelled
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, -1)).transpose(1, 2)
        mask = self.mask(x)
        if not self.spelled:
            y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        else:
            scores = q @ q.transpose(-1, -2) * 0.5
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, float("-inf"))
            elif mask is not None:
                scores = scores + mask
            y = scores.softmax(-1) @ q
        return y.transpose(1, 2).flatten(-2)


def plan_of(model: nn.Module, inputs: Any) -> Planned | Refusal:
    """What is to become of the only attention of a model."""
    captured = capture(model.eval(), to_call(inputs))
    graph = (captured.analysis or captured.regions[0]).graph.graph
    found = [p for n in graph.nodes if n.op == "call_function" if (p := planned(n)) is not None]
    assert found
    return found[0]


def places(x: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(x.shape[1])
    return at[:, None], at[None]


def causal(x: Tensor) -> Tensor:
    i, j = places(x)
    return j <= i


def band(x: Tensor) -> Tensor:
    i, j = places(x)
    return (j <= i) & (i - j < 300)  # longer than every example


def sunk(x: Tensor) -> Tensor:
    i, j = places(x)
    return (j <= i) & ((j > i - 4) | (j < 2))


def two_sided(x: Tensor) -> Tensor:
    i, j = places(x)
    return (i - j).abs() <= 3


def lower(x: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril()


def above_hidden(x: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.full((n, n), float("-inf")).triu(1)


def added(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[1], x.shape[1]).masked_fill(~causal(x), torch.finfo(x.dtype).min)


def chosen(x: Tensor) -> Tensor:
    return torch.where(causal(x), 0.0, torch.finfo(x.dtype).min)[None, None]


def nearly(x: Tensor) -> Tensor:
    """Causal unless the first number is large, which no example shows."""
    return causal(x) | (x[:, :1, :1] > 1e6)[:, None]


def prefix(x: Tensor) -> Tensor:
    i, j = places(x)
    return (j <= i) | (j < 3)


def every(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)


PROVEN: dict[str, tuple[Callable[[Tensor], Tensor | None], str]] = {
    "none": (lambda x: None, "all_true"),
    "every": (every, "all_true"),
    "causal": (causal, "causal"),
    "tril": (lower, "causal"),
    "triu of -inf": (above_hidden, "causal"),
    "zeros filled": (added, "causal"),
    "where": (chosen, "causal"),
    "band": (band, "causal, window 300"),
    "sinks": (sunk, "causal, window 4, 2 sinks"),
    "two-sided": (two_sided, "up to +3, window 4"),
    "not quite causal": (nearly, "data_dependent"),
    "prefix": (prefix, "data_dependent"),
}


@pytest.mark.parametrize("spelled", [False, True], ids=["sdpa", "softmax"])
@pytest.mark.parametrize("name", PROVEN)
def test_what_the_graph_proves(name: str, spelled: bool) -> None:
    mask, want = PROVEN[name]
    found = plan_of(Masked(mask, spelled), floats(2, 9, 8))
    if isinstance(found, Refusal):
        assert spelled and want == "data_dependent" and found.code == "DEAD_ROWS"
        return
    assert str(found.rule) == want or found.bias is not None
    assert (found.bias is not None) == (want == "data_dependent")


@pytest.mark.parametrize("spelled", [False, True], ids=["sdpa", "softmax"])
@pytest.mark.parametrize("name", PROVEN)
@pytest.mark.parametrize("length", [3, 9, 70, 400])
def test_what_is_proven_is_so_at_every_length(name: str, spelled: bool, length: int) -> None:
    mask, _ = PROVEN[name]
    found = plan_of(Masked(mask, spelled), floats(2, 9, 8))
    if isinstance(found, Refusal) or found.bias is not None:
        pytest.skip("handed over as it is")
    shown = mask(torch.zeros(2, length, 8))
    at = torch.arange(length)
    seen = found.form.visible(at, at)
    seen = torch.ones(length, length, dtype=torch.bool) if seen is None else seen
    if shown is None:
        assert bool(seen.all())
    else:
        true = shown if shown.dtype == torch.bool else shown == 0
        assert torch.equal(seen, true.expand(1, 1, length, length)[0, 0])


OPS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "j <= i + c": lambda i, j, c: j <= i + c,
    "j < i + c": lambda i, j, c: j < i + c,
    "i - j < c": lambda i, j, c: i - j < c,
    "i >= j - c": lambda i, j, c: i >= j - c,
    "j < c": lambda i, j, c: j < c,
    "j >= 0": lambda i, j, c: j >= 0,
    "2 j > c": lambda i, j, c: 2 * j > c,
    "|i - j| <= c": lambda i, j, c: (i - j).abs() <= abs(c),
    "i == j": lambda i, j, c: i == j,
    "-i <= c": lambda i, j, c: -i <= abs(c),
}


class Alone(nn.Module):
    """A mask and nothing else."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return self.mask(x)


@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(
        st.tuples(st.sampled_from(sorted(OPS)), st.integers(-4, 6)), min_size=1, max_size=3
    ),
    joins=st.lists(st.sampled_from(["and", "or"]), min_size=2, max_size=2),
    flip=st.booleans(),
)
def test_random_masks_are_read_right(
    words: list[tuple[str, int]], joins: list[str], flip: bool
) -> None:
    """Whatever a form says of a mask is true of it at lengths that no example had."""

    def mask(x: Tensor) -> Tensor:
        i, j = places(x)
        ones = [OPS[word](i, j, c) for word, c in words]
        found = ones[0]
        for join, one in zip(joins, ones[1:], strict=False):
            found = found & one if join == "and" else found | one
        found = found & (j >= 0) & (i >= 0)  # every mask has both dimensions
        return ~found if flip else found

    lengths = {"x": {1: torch.export.Dim.AUTO}}
    graph = torch.export.export(Alone(mask), (torch.zeros(1, 7, 8),), dynamic_shapes=lengths).graph
    (node,) = graph.output_node().args[0]
    told = seen_by(node)
    assert told is not None
    rule = rule_of(told[0])
    fields = rule.fields()
    if rule.rest or rule.nothing or fields is None:
        return
    for length in (1, 5, 23):
        at = torch.arange(length)
        seen = Softmax(1.0, **fields).visible(at, at)
        seen = torch.ones(length, length, dtype=torch.bool) if seen is None else seen
        assert torch.equal(seen, mask(torch.zeros(1, length, 8)).expand(length, length))


@pytest.mark.parametrize(
    ("name", "proven", "torch_causal"),
    [("bert", "padding", None), ("gpt2", "causal", True), ("llama", "causal", True),
     ("vit", "all_true", False), ("encoder", "all_true", False)],
)  # fmt: skip
def test_real_models(name: str, proven: str, torch_causal: bool | None) -> None:
    found = plan_of(ZOO[name].model(), ZOO[name].call())
    assert isinstance(found, Planned)
    assert str(found.rule) == proven and found.torch_causal == torch_causal
    assert found.bias is None and bool(found.keys) == ("padding" in proven)


def test_padding_that_may_hide_every_key_stays_added() -> None:
    found = plan_of(bert(attn_implementation="eager"), padded(2, 7))
    assert isinstance(found, Planned) and found.bias is not None and found.rule.full
    causal_bert = bert(is_decoder=True, use_cache=False)
    found = plan_of(causal_bert, padded(2, 6))
    assert isinstance(found, Planned) and str(found.rule) == "causal, padding"
    assert isinstance(plan_of(causal_bert, {"input_ids": ids(2, 6)}), Planned)


def wrapped(x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1]).to(torch.int8)  # 128 is -128
    return at[None] <= at[:, None]


def rounded(x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1]).to(torch.bfloat16)  # 257 is 256
    return at[None] <= at[:, None]


def expanded(x: Tensor) -> Tensor:
    at = torch.arange(1).expand(x.shape[1])  # always 0
    return torch.arange(x.shape[1])[:, None] >= at[None]


@pytest.mark.parametrize("mask", [wrapped, rounded])
def test_indices_that_wrap_or_round_are_not_trusted(mask: Callable[[Tensor], Tensor]) -> None:
    found = plan_of(Masked(mask), floats(2, 9, 8))
    assert isinstance(found, Planned) and found.bias is not None


def test_an_index_of_one_is_zero_wherever_it_is_expanded() -> None:
    found = plan_of(Masked(expanded), floats(2, 9, 8))
    assert isinstance(found, Planned) and found.rule.full and found.bias is None


def filled(x: Tensor) -> Tensor:
    mask = lower(x)
    mask[:, :3].fill_(True)
    return mask


def assigned(x: Tensor) -> Tensor:
    mask = lower(x)
    mask[:, 0] = False
    return mask


def zeroed(x: Tensor) -> Tensor:
    mask = above_hidden(x)
    mask[:, :3] = 0
    return mask


def first_row(x: Tensor) -> Tensor:
    return causal(x)[:1].expand(x.shape[1], x.shape[1])


def one_row_triangle(x: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.ones(1, n, dtype=torch.bool).tril(3).expand(n, n)


@pytest.mark.parametrize("mask", [filled, assigned, zeroed, first_row, one_row_triangle])
def test_writes_and_single_rows_are_no_triangle(mask: Callable[[Tensor], Tensor]) -> None:
    inputs = floats(2, 9, 8)
    found = plan_of(Masked(mask), inputs)
    assert isinstance(found, Refusal) or str(found.rule) not in ("causal", "up to +3")
    if isinstance(found, Planned) and found.bias is None:
        at = torch.arange(9)
        seen = found.form.visible(at, at)
        assert seen is not None and torch.equal(seen, mask(inputs))


def test_a_window_of_later_keys_leaves_the_last_queries_nothing() -> None:
    def later(x: Tensor) -> Tensor:
        i, j = places(x)
        return (j >= i + 2) & (j <= i + 5)

    found = plan_of(Masked(later, spelled=True), floats(2, 9, 8))
    assert isinstance(found, Planned) and found.form.fill == -torch.inf  # NaN, as there


class Buffered(nn.Module):
    """Attention whose mask is cut from a buffer, as nanoGPT's."""

    def __init__(self, mask: Tensor, hides: Callable[[Tensor], Tensor], *, writes: bool = False):
        super().__init__()
        self.register_buffer("bias", mask)
        self.q, self.hides, self.writes = nn.Linear(8, 8), hides, writes

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if self.writes:
            self.bias[..., 0, 1] = 1
        q = self.q(x).unflatten(-1, (2, -1)).transpose(1, 2)
        scores = q @ q.transpose(-1, -2) * 0.5
        scores = scores.masked_fill(self.hides(self.bias[:, :, :n, :n]), float("-inf"))
        return (scores.softmax(-1) @ q).transpose(1, 2).flatten(-2)


def triangle(n: int, *, window: int = 0) -> Tensor:
    lower = torch.ones(n, n).tril()
    return (lower - lower.tril(-window) if window else lower)[None, None]


def spoilt(n: int) -> Tensor:
    mask = triangle(n)
    mask[..., -1, 5] = 0  # where no example looks
    return mask


def is_zero(m: Tensor) -> Tensor:
    return m == 0


BUFFERS: dict[str, tuple[Tensor, Callable[[Tensor], Tensor], str]] = {
    "nanoGPT": (triangle(64), is_zero, "causal"),
    "boolean": (triangle(64).bool(), torch.logical_not, "causal"),
    "window": (triangle(64, window=5), is_zero, "causal, window 5"),
    "bytes": (triangle(64).to(torch.uint8), is_zero, "causal"),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_that_are_triangles_or_bands(name: str) -> None:
    mask, hides, want = BUFFERS[name]
    found = plan_of(Buffered(mask, hides), floats(2, 9, 8))
    assert isinstance(found, Planned) and str(found.rule) == want and found.bias is None


@pytest.mark.parametrize(
    "model", [Buffered(spoilt(64), is_zero), Buffered(triangle(64), is_zero, writes=True)],
    ids=["not quite", "written to"],
)  # fmt: skip
def test_buffers_that_are_not(model: nn.Module) -> None:
    found = plan_of(model, floats(2, 9, 8))
    assert isinstance(found, Planned) and found.bias is not None  # as it is


def repeated(x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1])[None].repeat(x.shape[0], 1)
    return (at[:, None] <= at[:, :, None])[:, None]


def cut_later(x: Tensor) -> Tensor:
    """Without its first row: j <= i + 1, and the last row twice."""
    mask = causal(x)
    return torch.cat([mask[1:], mask[-1:]])


def later_keys(x: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.ones(n + 3, n + 3, dtype=torch.bool).tril()[3:, 3:]


@pytest.mark.parametrize(
    ("mask", "want"), [(repeated, "causal"), (later_keys, "causal"), (cut_later, "data_dependent")]
)
def test_repeats_and_slices(mask: Callable[[Tensor], Tensor], want: str) -> None:
    found = plan_of(Masked(mask), floats(2, 9, 8))
    assert isinstance(found, Planned) and str(found.rule) == want
    assert (found.bias is None) == (want == "causal")


def test_documents_are_handed_over_with_what_is_proven_besides() -> None:
    """The kernel skips the blocks of a boolean mask by itself."""

    def packed(x: Tensor) -> Tensor:
        numbers = (x[..., 0] > 0).to(torch.int32).cumsum(-1)
        same = numbers[:, :, None] == numbers[:, None]
        return (same & causal(x))[:, None]

    for spelled in (False, True):
        found = plan_of(Masked(packed, spelled), floats(2, 9, 8))
        assert isinstance(found, Planned) and str(found.rule) == "causal, documents"
        assert found.form.causal and found.bias is not None
