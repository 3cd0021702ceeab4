"""Biases that depend on the lag alone are proven from the graph, and computed once a lag."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import floats

from structc.inputs import to_call
from structc.passes.capture import capture
from structc.passes.lags import by_lag, computed
from structc.passes.masks import Reading
from structc.passes.predicates import AtMost
from structc.passes.visibility import rule_of

H = 3
Bias = Callable[["Biased", Tensor, Tensor], Tensor]
"""Of the module, the indices of queries (n, 1) and those of keys (1, n)."""


class Biased(nn.Module):
    """Attention of projections of x under a bias."""

    def __init__(self, bias: Bias) -> None:
        super().__init__()
        self.bias, self.q = bias, nn.Linear(12, 12)
        self.table, self.slopes = nn.Embedding(16, H), nn.Parameter(torch.randn(H, 1, 1))
        self.far = nn.Parameter(torch.randn(H, 200))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (H, -1)).transpose(1, 2)
        at = torch.arange(x.shape[1])
        y = F.scaled_dot_product_attention(
            q, q, q, attn_mask=self.bias(self, at[:, None], at[None])
        )
        return y.transpose(1, 2).flatten(-2)


def bucket(lag: Tensor) -> Tensor:
    """As T5's: exact when near, logarithmic when far."""
    near = lag.abs()
    far = 4 + (torch.log(near.float() / 4) / 2.0 * 4).to(torch.long)
    found = (lag > 0).to(torch.long) * 8
    found += torch.where(near < 4, near, torch.min(far, torch.full_like(far, 7)))
    return found


def t5(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    return m.table(bucket(j - i)).permute(2, 0, 1)[None]


def t5_causal(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(j <= i, t5(m, i, j), torch.finfo(torch.float32).min)


def t5_added(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    return t5(m, i, j) + torch.where(j <= i, 0.0, torch.finfo(torch.float32).min)


def alibi(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    return (m.slopes * (j - i))[None]


def both_ways(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    return -m.slopes.exp() * (i - j).abs().float()


def turned(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    return (
        (m.slopes * (j.transpose(0, 1) - i.transpose(0, 1)))
        .transpose(1, 2)
        .clone()[None]
        .expand(1, H, -1, -1)
    )


def by_index(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    return m.far.mT[(i - j).clamp(-5, 5) + 5].permute(2, 0, 1)


BIASES: dict[str, tuple[Bias, str]] = {
    "T5": (t5, "all_true"),
    "T5, causal": (t5_causal, "causal"),
    "T5, a mask added": (t5_added, "causal"),
    "ALiBi": (alibi, "all_true"),
    "ALiBi both ways": (both_ways, "all_true"),
    "turned": (turned, "all_true"),
    "a table's rows": (by_index, "all_true"),
}


def bias_of(bias: Bias) -> tuple[nn.Module, torch.fx.Node]:
    """A model, and what its graph gives to its attention as a mask."""
    model = Biased(bias).eval()
    (region,) = capture(model, to_call(floats(2, 9, 12))).regions
    target = torch.ops.aten.scaled_dot_product_attention.default
    (node,) = region.graph.graph.find_nodes(op="call_function", target=target)
    return model, node.args[3]


@pytest.mark.parametrize("name", BIASES)
def test_one_value_a_lag(name: str) -> None:
    """The same numbers as the whole bias has, at lengths that no example had."""
    bias, rule = BIASES[name]
    model, node = bias_of(bias)
    found = by_lag(node, Reading(node.graph))
    assert found is not None and found.heads == H and str(rule_of(found.seen)) == rule
    owner = node.graph.owning_module
    for n in (1, 2, 9, 70):
        with torch.no_grad():
            lags = torch.arange(1 - n, n)
            kept: dict[torch.fx.Node, Tensor] = {}

            def get(at: torch.fx.Node, kept: dict[torch.fx.Node, Tensor] = kept) -> Tensor:
                if at.op == "get_attr":
                    return torch.fx.graph_module._get_attr(owner, str(at.target))
                if at not in kept:
                    args, kwargs = torch.fx.node.map_arg((at.args, at.kwargs), get)
                    kept[at] = at.target(*args, **kwargs)
                return kept[at]

            values = computed(found, lags, lambda op, *args, **kw: op(*args, **kw), get)
            at = torch.arange(n)
            whole = model.bias(model, at[:, None], at[None])
            whole = whole if whole.dim() == 4 else whole[None]
        assert values.shape == (H, 2 * n - 1)
        each = values[:, at[:, None] - at + n - 1]
        shown = whole[0] > -1e30
        assert torch.equal(each[shown], whole[0][shown])


def each_key(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    return m.slopes * j + 0 * i


def sums(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    return m.table((i + j).clamp(max=15)).permute(2, 0, 1)


def each_pair(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    return m.far[:, :1, None] * (i - j) * j


def scaled(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    return m.slopes * (i - 2 * j)


def written_later(m: Biased, i: Tensor, j: Tensor) -> Tensor:
    lag = i - j
    found = m.slopes * lag
    lag[:, 0] = 7
    return found + lag


@pytest.mark.parametrize("bias", [each_key, sums, each_pair, scaled, written_later])
def test_what_is_no_function_of_the_lag(bias: Bias) -> None:
    _, node = bias_of(bias)
    assert by_lag(node, Reading(node.graph)) is None


def test_a_sum_in_place_is_a_sum_where_nothing_else_reads() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            at = torch.arange(x.shape[1])
            once, kept = at * 1, at * 2
            view = kept[:]
            once += 3
            kept += 3
            return once[:, None] <= at, view[:, None] <= at

    graph = torch.export.export(Twice(), (torch.zeros(2, 7),)).graph
    read = Reading(graph)
    first, second = graph.output_node().args[0]
    assert isinstance(read(first), AtMost) and not isinstance(read(second), AtMost)
