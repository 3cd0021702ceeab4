"""What the operators compute, in plain ATen: always there, differentiable, never refusing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from structc import spectral
from structc.forms import (
    Act,
    Add,
    Bias,
    Block,
    Convolve,
    Displace,
    Flip,
    Keep,
    Load,
    Mul,
    Norm,
    Permute,
    Repeat,
    Select,
    Shared,
    Sparse,
    Step,
    Tile,
    Transform,
)

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def tile_reference(
    x: Tensor, weights: Sequence[Tensor], program: str, others: Sequence[Tensor] = ()
) -> Tensor:
    """Interpret a tile program step by step in plain ATen; ``others`` are inputs 1, 2, ...

    >>> x, u, v = torch.randn(5, 6), torch.randn(1, 2, 6, 1), torch.randn(1, 4, 2, 1)
    >>> y = tile_reference(x, [u, v], "block(1,2,6,1) block(1,4,2,1)")
    >>> torch.allclose(y, x @ (v[0, ..., 0] @ u[0, ..., 0]).T, atol=1e-5)
    True
    """
    left, slots = iter(weights), dict(enumerate([x, *others]))
    for step in Tile.parse(program).steps:
        x = apply_step(step, x, left, slots)
    return x


def apply_step(step: Step, x: Tensor, left: Iterator[Tensor], slots: dict[int, Tensor]) -> Tensor:
    """One step of a program in plain ATen; takes its weights from ``left``, may write a slot."""
    match step:
        case Block(a, b, c, d):
            x = _block(x, next(left).reshape(a, b, c, d))
        case Repeat(a, b, c, d):
            y = _block(x.unflatten(-1, (a, c * d)), next(left).reshape(1, b, c, d))
            x = y.flatten(-2)
        case Shared(a, b, c, d):
            x = _shared(x, next(left).reshape(b, c), (a, c, d))
        case Permute(p, q):
            x = x.unflatten(-1, (p, q)).transpose(-1, -2).flatten(-2)
        case Bias():
            x = x + next(left)
        case Act(fn, _):
            x = ACTIVATION[fn](x)
        case Add(_, index):
            x = x + slots[index]
        case Mul(_, index):
            x = x * slots[index]
        case Keep(_, index):
            slots[index] = x
        case Load(_, index):
            x = slots[index]
        case Select():
            x = x.index_select(-1, next(left))
        case Sparse(m, _, b, c, _):
            x = _sparse(x, next(left), next(left), next(left), (m, b, c))
        case Flip():
            x = x.flip(-1)
        case Convolve():
            x = spectral.convolve(x, next(left), step)
        case Displace():
            x = spectral.displace(x, next(left), next(left), step)
        case Transform():
            x = spectral.transform(x, step)
        case Norm(n, "layer", eps):
            x = F.layer_norm(x, (n,), next(left), next(left), float(eps))
        case Norm(n, "rms", eps):
            x = F.rms_norm(x, (n,), next(left), float(eps))
    return x


def _block(x: Tensor, w: Tensor) -> Tensor:
    a, _, c, d = w.shape
    if x.dtype != w.dtype and (x.is_complex() or w.is_complex()):
        dtype = torch.promote_types(x.dtype, w.dtype)
        x, w = x.to(dtype), w.to(dtype)
    if a == d == 1:
        return F.linear(x, w[0, :, :, 0])
    y = torch.einsum("abcd,...acd->...abd", w, x.unflatten(-1, (a, c, d)))
    return y.flatten(-3)


def _shared(x: Tensor, w: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    a, c, d = sizes
    if d == 1:
        return _block(x.unflatten(-1, (a, c)), w[None, :, :, None]).flatten(-2)
    y = _block(x.unflatten(-1, (a, c, d)).mT, w[None, :, :, None])
    return y.mT.flatten(-3)


def _sparse(
    x: Tensor, values: Tensor, edges: Tensor, columns: Tensor, sizes: tuple[int, int, int]
) -> Tensor:
    m, b, c = sizes
    rows = torch.arange(m // b, device=x.device).repeat_interleave(edges.diff())
    parts = x.unflatten(-1, (-1, c)).index_select(-2, columns)
    products = torch.einsum("ebc,...ec->...eb", values, parts)
    y = products.new_zeros(*x.shape[:-1], m // b, b)
    return y.index_add(-2, rows, products).flatten(-2)


def dense_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "", transposed: bool = False
) -> Tensor:
    """``act(x @ W.T + b)`` in plain ATen; a transposed weight is stored (in, out)."""
    return ACTIVATION[act](F.linear(x, weight.t() if transposed else weight, bias))
