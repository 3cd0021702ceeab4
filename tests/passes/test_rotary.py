"""Rotary positions are seen however a model writes them, and nothing else is taken for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import DECODER, ids, small

from structc.inputs import to_call
from structc.passes.capture import capture
from structc.passes.detect import detect
from structc.passes.rotary import rotates


def halves(x: Tensor, a: Tensor) -> Tensor:
    """LLaMA."""
    a = torch.cat([a, a], -1)
    first, second = x.chunk(2, -1)
    return x * a.cos() + torch.cat([-second, first], -1) * a.sin()


def scaled(x: Tensor, a: Tensor) -> Tensor:
    """YaRN: cos and sin have a factor; and scores are scaled in front."""
    return halves(x, a) * 0.3


def split(x: Tensor, a: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * a.cos() + second * a.sin(), first * -a.sin() + second * a.cos()], -1)


def neighbours(x: Tensor, a: Tensor) -> Tensor:
    """GPT-J."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack(
        [even * a.cos() - odd * a.sin(), odd * a.cos() + even * a.sin()], -1
    ).flatten(-2)


def complexes(x: Tensor, a: Tensor) -> Tensor:
    """LLaMA as it was published."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(a), a)).flatten(-2).type_as(x)


def partly(x: Tensor, a: Tensor) -> Tensor:
    """GPT-NeoX: some features are not rotated."""
    return torch.cat([halves(x[..., :8], a[:, ::2]), x[..., 8:]], -1)


def gate(x: Tensor, a: Tensor) -> Tensor:
    """Looks like one; cos and sin are the same numbers."""
    a = torch.cat([a, a], -1)
    first, second = x.chunk(2, -1)
    return x * a + torch.cat([-second, first], -1) * a


def mirror(x: Tensor, a: Tensor) -> Tensor:
    """The halves swap, without a sign: no rotation."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * a.cos() + second * a.sin(), second * a.cos() + first * a.sin()], -1)


def still(x: Tensor, a: Tensor) -> Tensor:
    """The same angle everywhere says nothing of positions."""
    return halves(x, a * 0)


def learned(x: Tensor, a: Tensor) -> Tensor:
    return x + torch.cat([a, a], -1)


class Turned(nn.Module):
    """Attention of two heads of 16 dimensions."""

    def __init__(self, turn: Any, keys: Any = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.turn, self.keys = turn, keys or turn

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        at = torch.arange(x.shape[1])[:, None] * 100 ** -(torch.arange(8) / 8)
        out = nn.functional.scaled_dot_product_attention(self.turn(q, at), self.keys(k, at), v)
        return out.transpose(1, 2).flatten(2)


def seen(model: nn.Module, call: Any) -> list[bool]:
    return [a.rotary for a in detect(capture(model.eval(), to_call(call))).attention]


@pytest.mark.parametrize("turn", [halves, scaled, split, neighbours, complexes, partly])
def test_rotations_are_seen(turn: Any) -> None:
    assert seen(Turned(turn), (torch.randn(2, 12, 32),)) == [True]


@pytest.mark.parametrize("turn", [gate, mirror, still, learned])
def test_others_are_not(turn: Any) -> None:
    assert seen(Turned(turn), (torch.randn(2, 12, 32),)) == [False]


def test_queries_alone_are_not_enough() -> None:
    assert seen(Turned(halves, learned), (torch.randn(2, 12, 32),)) == [False]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LlamaModel", DECODER),
        ("GPTNeoXModel", DECODER | {"rotary_pct": 0.5}),
        ("GPTJModel", {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}),
    ],
)
def test_models_of_transformers(name: str, config: dict[str, Any]) -> None:
    found = seen(small(name, **config)(), {"input_ids": ids(2, 12), "use_cache": False})
    assert found and all(found)


def test_models_without() -> None:
    model = small("GPT2Model", n_embd=32, n_layer=1, n_head=2)()
    assert seen(model, {"input_ids": ids(2, 12), "use_cache": False}) == [False]


def test_numbers_that_are_no_rotation() -> None:
    at = torch.arange(5.0)
    assert rotates([at.cos(), at.sin(), at.cos(), at.sin()])
    assert not rotates([at.cos(), at.sin(), at.cos(), at.cos()])
    assert not rotates([])
    assert not rotates([None, at])
    assert not rotates([at.cos(), at[:3].sin()])
    assert not rotates([at.cos() * float("nan"), at.sin()])
    assert not rotates([at.cos()])
