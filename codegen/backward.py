"""Gradients of linear tile programs on emitted kernels: what healing and fine-tuning spend time on.

The reference differentiates its own steps, which copy activations for each permutation. Here the
gradient of an input is a program itself, that of the transposed factors in reverse order, and the
gradient of a factor is one batched product of what went in and what came back.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from structc import ops, reference
from structc.codegen.cpu import tile
from structc.forms import Act, Bias, Block, Permute, Step, Tile
from structc.records import Refusal

FEW = 64
"""Below so many rows threads share the outputs of a product."""


@dataclass(frozen=True)
class Part:
    """One factor with the shuffle behind it.

    Attributes:
        block: the factor.
        behind: the shuffle, or None.
    """

    block: Block
    behind: Permute | None = None

    def forward(self) -> Tile:
        """From the factor's input to the next one's."""
        return Tile((self.block, *self._behind()))

    def backward(self) -> Tile:
        """From a gradient at the next factor's input to one at this factor's."""
        b = self.block
        back = (Permute(s.q, s.p) for s in self._behind())
        return Tile((*back, Block(b.a, b.c, b.b, b.d)))

    def _behind(self) -> tuple[Permute, ...]:
        return () if self.behind is None else (self.behind,)


def parts_of(form: Tile) -> tuple[tuple[Part, ...], bool, str] | None:
    """Factors, whether a bias follows, and the activation at the end; None for other programs.

    >>> parts, bias, act = parts_of(Tile.parse("block(1,2,6,1) block(1,4,2,1) bias(4)"))
    >>> len(parts), bias, act
    (2, True, '')
    """
    steps: list[Step] = list(form.steps)
    last = steps.pop() if isinstance(steps[-1], Act) else None
    act = last.fn if isinstance(last, Act) else ""
    bias = bool(steps) and isinstance(steps[-1], Bias)
    steps = steps[:-1] if bias else steps
    parts: list[Part] = []
    for before, step in itertools.pairwise([None, *steps]):
        if isinstance(step, Block):
            parts.append(Part(step))
        elif isinstance(step, Permute) and isinstance(before, Block):
            parts[-1] = Part(parts[-1].block, step)
        else:
            return None
    return (tuple(parts), bias, act) if parts else None


@dataclass(eq=False)
class Backward:
    """``(x, weights, grad) -> gradients`` of one program in one dtype.

    Kernels are built when the first gradient is asked for.
    """

    form: Tile
    dtype: torch.dtype
    _kernels: dict[tuple[Tile, int], tile.TileKernel] = field(default_factory=dict)

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor], grad: Tensor
    ) -> tuple[Tensor, list[Tensor]] | None:
        """Gradients of x and of each weight, rows flat; None where no kernel serves them."""
        found = parts_of(self.form)
        if found is None or any(w.dtype != self.dtype for w in weights):
            return None
        parts, bias, act = found
        factors = weights[: len(parts)]
        try:
            streams = self._streams(parts, factors, x)
            if act:
                grad = self._through(parts, weights, bias, act, streams, grad)
            gradients = [grad.sum(0)] if bias else []
            for at in reversed(range(len(parts))):
                part, w, own = parts[at], factors[at], grad
                if part.behind is not None:  # as the factor gave it
                    own = grad.unflatten(-1, (part.behind.q, part.behind.p)).mT.flatten(-2)
                gradients.insert(0, _outer(part.block, streams[at], own).reshape(w.shape))
                grad = self._run(part.backward(), grad, _transposed(part.block, w))
        except _Unserved:
            return None
        return grad, gradients

    def _streams(self, parts: Sequence[Part], factors: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """What goes into each factor."""
        streams = [x]
        for part, w in zip(parts[:-1], factors[:-1], strict=True):
            streams.append(self._run(part.forward(), streams[-1], w))
        return streams

    def _through(
        self,
        parts: Sequence[Part],
        weights: Sequence[Tensor],
        bias: bool,
        act: str,
        streams: Sequence[Tensor],
        grad: Tensor,
    ) -> Tensor:
        """The gradient before the activation."""
        y = self._run(parts[-1].forward(), streams[-1], weights[len(parts) - 1])
        y = y + weights[-1] if bias else y
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            (before,) = torch.autograd.grad(reference.ACTIVATION[act](leaf), leaf, grad)
        return before

    def _run(self, form: Tile, x: Tensor, weight: Tensor) -> Tensor:
        split = int(x.shape[0] < FEW)
        kernel = self._kernels.get((form, split))
        if kernel is None:
            made = tile.make(form, {"split": split}, dtype=self.dtype)
            if isinstance(made, Refusal):
                raise _Unserved
            kernel = self._kernels[form, split] = made
        return kernel(x, [weight])


class _Unserved(Exception):
    """No kernel for one of the parts: the reference differentiates the whole."""


def _transposed(block: Block, weight: Tensor) -> Tensor:
    """(a, c, b, d)."""
    return weight.reshape(block.a, block.b, block.c, block.d).transpose(1, 2)


def _outer(block: Block, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient (a, b, c, d) of a factor: sum over rows of grad times x."""
    a, b, c, d = block.a, block.b, block.c, block.d
    if d > 1:
        left, right = grad.view(-1, a, b, d), x.view(-1, a, c, d)
        return torch.einsum("tabd,tacd->abcd", left, right)
    left, right = grad.reshape(-1, a, b).permute(1, 2, 0), x.view(-1, a, c).transpose(0, 1)
    return torch.bmm(left, right)


def attach(form: Tile, dtype: torch.dtype) -> None:
    """Let gradients of a program go this way, if it is one of products alone."""
    if parts_of(form) is not None:
        ops.attach_backward(ops.tile_key(str(form), dtype), Backward(form, dtype))
