"""Heads of one attention by different methods: ``structc::attention_by_head``.

Which heads a method computes, and at which lengths, is the operator's last argument; at any other
length, and where keys are padding, all heads are exact. So short inputs are as fast as before, and
inputs that are longer than what was verified are as good.

>>> groups = groups_of("window_sinks(window=256,sinks=4)@512..2048:0,3")
>>> groups[0].method, groups[0].heads, groups[0].least
(WindowSinks(scale=None, window=256, sinks=4, is_causal=True), (0, 3), 512)
>>> text_of(groups)
'window_sinks(window=256,sinks=4)@512..2048:0,3'
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from structc import ops
from structc.attend import attention
from structc.attention.base import AbstractMethod
from structc.attention.methods import BY_NAME
from structc.errors import ConfigError, InternalError
from structc.softmax import Extras, Softmax

_GROUP = re.compile(r"(\w+)\((.*)\)@(\d+)\.\.(\d+):(\d+(?:,\d+)*)")
_NAME = "attention_by_head"


@dataclass(frozen=True)
class HeadGroup:
    """Some heads of an attention and the method that computes them.

    Attributes:
        method: with its scale and direction.
        heads: of queries, ascending.
        least, most: lengths at which it is used: from where it is faster to where it was verified.
    """

    method: AbstractMethod
    heads: tuple[int, ...]
    least: int
    most: int

    def __str__(self) -> str:
        heads = ",".join(map(str, self.heads))
        return f"{method_text(self.method)}@{self.least}..{self.most}:{heads}"


def method_text(method: AbstractMethod) -> str:
    """A method as text: what differs from its defaults.

    >>> from structc.attention import Monarch
    >>> method_text(Monarch(64, is_causal=True))
    'monarch(block_size=64,is_causal=True)'
    """
    given = ((f, getattr(method, f.name)) for f in fields(method))
    shown = [(f.name, value) for f, value in given if value != f.default]
    order = sorted(shown, key=lambda item: item[0] == "scale")
    return f"{method.name}({','.join(f'{name}={value!r}' for name, value in order)})"


def method_of(text: str) -> AbstractMethod:
    """The method that :func:`method_text` wrote.

    Errors: :class:`InternalError` for any other text.
    """
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return BY_NAME[call.func.id](**given)
    except (SyntaxError, ValueError, KeyError, TypeError, ConfigError):
        raise InternalError(f"{text!r} is no attention method") from None


def text_of(groups: Sequence[HeadGroup]) -> str:
    """All groups as text."""
    return ";".join(map(str, groups))


@functools.lru_cache(maxsize=4096)
def groups_of(text: str) -> tuple[HeadGroup, ...]:
    """The groups that :func:`text_of` wrote.

    Errors: :class:`InternalError` for any other text, and where a head is in two groups.
    """
    found = []
    for part in text.split(";"):
        match = _GROUP.fullmatch(part)
        if match is None:
            raise InternalError(f"{part!r} is no group of heads")
        heads = tuple(map(int, match[5].split(",")))
        method = method_of(f"{match[1]}({match[2]})")
        found.append(HeadGroup(method, heads, int(match[3]), int(match[4])))
    every = [h for group in found for h in group.heads]
    if len(set(every)) != len(every):
        raise InternalError(f"{text!r} has a head twice")
    return tuple(found)


def by_head(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, form: Softmax, groups: str
) -> Tensor:
    """Attention whose heads are computed by the methods of ``groups`` where these are used.

    Args:
        q, k, v: ``(B, H, n, d)``; heads of keys may be fewer.
        keys: ``(B or 1, n_k)`` boolean, or None: with padding all heads are exact.
        form: of exact attention.
        groups: as :func:`text_of` writes them.
    """
    n, m = q.shape[2], k.shape[2]
    live: list[HeadGroup] = []
    if n == m and n and (keys is None or bool(keys.all())):
        live = [g for g in groups_of(groups) if g.least <= n <= g.most]
    count = q.shape[1]
    if any(g.heads[-1] >= count for g in live):
        raise RuntimeError(f"structc::{_NAME}: {groups!r} names heads past {count}")
    live = [g for g in live if g.method.holds(*_heads(q, k, v, g.heads)[:2])]
    if not live:
        return attention(q, k, v, form, Extras(keys=keys))[0]
    o = q.new_empty(q.shape[0], n, count, v.shape[-1]).transpose(1, 2)
    exact = set(range(count))
    for group in live:
        o[:, group.heads] = group.method(*_heads(q, k, v, group.heads))
        exact -= set(group.heads)
    if exact:
        rest = tuple(sorted(exact))
        o[:, rest] = attention(*_heads(q, k, v, rest), form)[0]
    return o


def _heads(
    q: Tensor, k: Tensor, v: Tensor, heads: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Some heads of queries, each with its own of keys and values."""
    group = q.shape[1] // k.shape[1]
    at = tuple(h // group for h in heads)
    return _some(q, heads), _some(k, at), _some(v, at)


def _some(t: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads: a view where they are neighbours or one and the same."""
    first, count = heads[0], len(heads)
    if heads == tuple(range(first, first + count)):
        return t[:, first : first + count]
    if heads[-1] == first:
        return t[:, first : first + 1].expand(-1, count, -1, -1)
    return t[:, heads]


def _impl(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, form: str, heads: str) -> Tensor:
    ops.count_call()
    return by_head(q, k, v, keys, Softmax.parse(form), heads)


def _fake(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, form: str, heads: str) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, keys, ctx.form, ctx.heads = inputs
    ctx.padded = keys is not None
    ctx.save_for_backward(q, k, v, *([keys] if ctx.padded else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Computed again: methods save memory that their intermediates would take."""
    q, k, v, *rest = ctx.saved_tensors
    keys = rest[0] if rest else None
    if not torch.is_grad_enabled():  # an operator of its own: methods look at values
        op = torch.ops.structc.attention_by_head_backward
        return (*op(grad, q, k, v, keys, ctx.form, ctx.heads), None, None, None)
    leaves = [t.view_as(t) for t in (q, k, v)]  # they may come from each other
    o = by_head(leaves[0], leaves[1], leaves[2], keys, Softmax.parse(ctx.form), ctx.heads)
    return (*_pulled(o, leaves, grad, create_graph=True), None, None, None)


def _pulled(
    o: Tensor, leaves: Sequence[Tensor], grad: Tensor, *, create_graph: bool = False
) -> list[Any]:
    """Gradients of leaves that want one: 0 where no method looks at them."""
    asked = [t for t in leaves if t.requires_grad] if o.requires_grad else []
    options = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(o, asked, grad, **options) if asked else ()
    given = dict(zip(map(id, asked), found, strict=True))
    return [given.get(id(t), torch.zeros_like(t) if t.requires_grad else None) for t in leaves]


def _backward_impl(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    q, k, v, keys, form, heads = given
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        o = by_head(leaves[0], leaves[1], leaves[2], keys, Softmax.parse(form), heads)
    return tuple(_pulled(o, leaves, grad))


def _backward_fake(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in given[:3])


_ARGS = "Tensor q, Tensor k, Tensor v, Tensor? keys, str form, str heads"
ops._LIB.define(f"{_NAME}({_ARGS}) -> Tensor")
ops._LIB.define(f"{_NAME}_backward(Tensor grad, {_ARGS}) -> (Tensor, Tensor, Tensor)")
ops._LIB.impl(_NAME, _impl, "CompositeExplicitAutograd")
ops._LIB.impl(f"{_NAME}_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake(f"structc::{_NAME}_backward", _backward_fake, lib=ops._LIB)
torch.library.register_fake(f"structc::{_NAME}", _fake, lib=ops._LIB)
torch.library.register_autograd(f"structc::{_NAME}", _backward, setup_context=_setup, lib=ops._LIB)
