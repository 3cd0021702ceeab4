"""A tile program as emitters see it: factors in turn, with what follows each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structc.forms import (
    SPECTRAL,
    Act,
    Add,
    Bias,
    Block,
    Convolve,
    Keep,
    Load,
    Mul,
    Norm,
    Pattern,
    Permute,
    Repeat,
    Select,
    Shared,
    Sparse,
    Step,
    Tile,
)
from structc.records import Refusal

MERGED = 16
"""Consecutive small factors become one whose blocks have at most this many rows and columns."""
FREE_GROWTH = 2.0
"""A merged factor may take so many times the products of its parts: calls and passes are saved."""
THIN = 16
"""Blocks below this leave vectors empty: vectors then run across blocks."""
DEPTH = 32
"""bfloat16 products take so many columns at a time."""


@dataclass(frozen=True)
class Stage:
    """One factor as it runs, and what is done to its output.

    Attributes:
        kind: ``panel`` (a block factor with d = 1), ``strided`` (d > 1), ``woven`` (strided, its
            output shuffled), ``sparse``, ``listed`` (a selection), ``shuffle``, ``move`` (no
            factor: its input goes on to what follows), ``convolve``.
        block: the pattern, of several merged factors perhaps; of a sparse one (1, b, c, nnz); of
            the last four (1, out, in, 1).
        out: features.
        weights: which of the program's weights it is made of, first applied first.
        parts: their patterns, before any were merged.
        blocks: its input is read through a shuffle of so many blocks; 0 as it is.
        run: how many features stay side by side in a shuffle that is carried out; of a sparse
            factor how many blocks a row of the matrix has room for.
        ordered: the shuffle before it was carried out in runs, of so many blocks.
        reads: the slot where its input is, or None: the stage before.
        bias: position of its bias among the weights.
        act: the activation behind that, or ``""``.
        mul, add: slots that it is multiplied by, and that are added then.
        norm: the normalisation behind that, and the position of its first weight.
        keeps: the slot where the output stays.
        inner: the stages in front of it whose outputs never leave the kernel.
        turns: its output is stored through a shuffle of so many blocks; 0 as it is.
        convolution: the step, of that kind.
    """

    kind: str
    block: Block
    out: int
    weights: tuple[int, ...] = ()
    parts: tuple[Pattern, ...] = ()
    blocks: int = 0
    run: int = 1
    ordered: int = 0
    reads: int | None = None
    bias: int | None = None
    act: str = ""
    mul: int | None = None
    add: int | None = None
    norm: tuple[Norm, int] | None = None
    keeps: int | None = None
    inner: tuple[Stage, ...] = ()
    turns: int = 0
    convolution: Convolve | None = None

    @property
    def tail(self) -> str:
        """The epilogue as the emitter's word for it: ``"bias+gelu"``."""
        return "+".join(filter(None, ["" if self.bias is None else "bias", self.act]))

    @property
    def whole(self) -> str:
        """What is done to whole rows, as the emitter's word for it: ``"mul+add+layer"``."""
        kind = "" if self.norm is None else self.norm[0].kind
        given = ["" if self.mul is None else "mul", "" if self.add is None else "add", kind]
        return "+".join(filter(None, given))

    @property
    def bare(self) -> bool:
        """Whether the product goes on as it is."""
        return not self.tail and not self.whole and self.keeps is None


@dataclass(frozen=True)
class Program:
    """Stages of a tile program, in the order in which they run."""

    stages: tuple[Stage, ...]
    inputs: tuple[int, ...]
    """Features of each input."""

    @property
    def out_features(self) -> int:
        return self.stages[-1].out


def stages_of(
    form: Tile, dtype: torch.dtype, *, folds: bool = False, convolves: bool = False
) -> Program | Refusal:
    """The program's stages, or why no kernel is emitted for it.

    Args:
        form: the program.
        dtype: of its factors.
        folds: whether every product can read its input through a shuffle; else those alone whose
            blocks stay side by side, and the others are carried out in front.
        convolves: whether there is a kernel for convolutions.

    >>> form = Tile.parse("block(1,8,32,1) block(1,32,8,1) act(relu,32)")
    >>> stages_of(form, torch.float32).stages[-1].act
    'relu'
    """
    left = (s for s in form.steps if isinstance(s, SPECTRAL))
    other = next((s for s in left if not (convolves and isinstance(s, Convolve))), None)
    if other is not None:
        return _refuse("SPECTRAL", f"{other} is for a library of transforms, not an emitted kernel")
    empty = [s for s in form.steps if not _filled(s)]
    if empty:
        return _refuse("EMPTY", f"{empty[0]} has no elements")
    reader = _Reader(dtype, folds)
    for step in form.steps:
        reader.take(step)
    return Program(tuple(_merged(reader.finish())), form.input_features)


def _filled(step: Step) -> bool:
    if isinstance(step, Pattern):
        return min(step.a, step.b, step.c, step.d) > 0
    if isinstance(step, Sparse):
        return min(step.m, step.n) > 0
    return step.out_features > 0


def _refuse(code: str, reason: str) -> Refusal:
    return Refusal("", "tile", code, reason)


# ---------------------------------------------------------------------------- stages


class _Reader:
    """Steps in, stages out: a step that fits behind the last stage joins it."""

    def __init__(self, dtype: torch.dtype, folds: bool) -> None:
        self.dtype, self.folds = dtype, folds
        self.stages: list[Stage] = []
        self.shuffle: Permute | None = None  # not yet carried out
        self.reads: int | None = None
        self.fresh = True  # nothing can join the last stage: there is none, or a slot was loaded
        self.n = 0
        self.weight = 0

    def take(self, step: Step) -> None:
        self.n = self.n or (0 if isinstance(step, Load) else step.in_features)
        match step:
            case Pattern(a, b, c, d):
                self._block(Block(a, b, c, d))
                self.stages[-1] = replace(self.stages[-1], parts=(step,))
            case Sparse(m, n, b, c, nnz):
                self._carry_out()
                self._push("sparse", Block(1, b, c, nnz), m, step.weights, run=n // c)
            case Convolve(n, m, _, _, _):
                self._carry_out()
                self._push("convolve", Block(1, m, n, 1), m, step.weights)
                self.stages[-1] = replace(self.stages[-1], parts=(), convolution=step)
            case Select(m, n):
                self._carry_out()
                self._push("listed", Block(1, m, n, 1), m, step.weights)
            case Permute(p, q):
                self._carry_out()
                self.shuffle = step if p > 1 and q > 1 else None
            case Load():
                self._carry_out()
                self.reads, self.fresh, self.n = step.index, True, step.n
            case _:
                self._carry_out()
                self._join(step)
        self.weight += step.weights

    def finish(self) -> list[Stage]:
        self._carry_out()
        if self.fresh:
            self._move()
        return self.stages

    def _push(self, kind: str, block: Block, out: int, weights: int = 0, **more: int) -> None:
        own = tuple(range(self.weight, self.weight + weights))
        made = Stage(kind, block, out, own, (block,), reads=self.reads)
        self.stages.append(replace(made, **more))  # type: ignore[arg-type]
        self.reads, self.fresh, self.n = None, False, out

    def _block(self, step: Block) -> None:
        shuffle, self.shuffle = self.shuffle, None
        kind = "panel" if step.d == 1 else "strided"
        if shuffle is None:
            return self._push(kind, step, step.out_features, 1)
        if self.folds:
            return self._push(kind, step, step.out_features, 1, blocks=shuffle.p)
        run = step.c // shuffle.p if step.d == 1 and step.c % shuffle.p == 0 else 0
        if run == 1 and max(step.b, step.c) < THIN <= step.a:
            across = Block(1, step.b, step.c, step.a)
            return self._push("woven", across, step.out_features, 1)
        if run and (self.dtype == torch.float32 or run % DEPTH == 0):
            return self._push(kind, step, step.out_features, 1, blocks=shuffle.p)
        self._shuffle(shuffle, max(run, 1))
        return self._push(kind, step, step.out_features, 1, ordered=shuffle.p if run > 1 else 0)

    def _carry_out(self) -> None:
        if self.shuffle is not None:
            self._shuffle(self.shuffle, 1)
            self.shuffle = None

    def _shuffle(self, step: Permute, run: int) -> None:
        n = step.out_features
        self._push("shuffle", Block(1, n, n, 1), n, blocks=step.p, run=run)

    def _move(self) -> None:
        self._push("move", Block(1, self.n, self.n, 1), self.n)

    def _join(self, step: Step) -> None:
        joined = None if self.fresh else _joined(self.stages[-1], step, self.weight)
        if joined is None:
            self._move()
            joined = _joined(self.stages[-1], step, self.weight)
            assert joined is not None
        self.stages[-1] = joined


def _joined(last: Stage, step: Step, weight: int) -> Stage | None:
    """The stage with one more step behind it, or None if its order does not allow that."""
    if last.keeps is not None:
        return None
    match step:
        case Bias() if last.bare and last.kind != "shuffle":
            return replace(last, bias=weight)
        case Act(fn, _) if not last.act and not last.whole and last.kind != "shuffle":
            return replace(last, act=fn)
        case Mul(_, index) if not last.whole:
            return replace(last, mul=index)
        case Add(_, index) if last.add is None and last.norm is None:
            return replace(last, add=index)
        case Norm() if last.norm is None:
            return replace(last, norm=(step, weight))
        case Keep(_, index):
            return replace(last, keeps=index)
    return None


# ---------------------------------------------------------------------------- merging


def _merged(stages: list[Stage]) -> list[Stage]:
    """Neighbours whose product is a block factor of small blocks, as one stage.

    A butterfly of ten factors of 2 x 2 becomes three of 16 x 16 and less: each pass over a tile
    then does enough arithmetic for what it loads.
    """
    done = [stages[0]]
    for stage in stages[1:]:
        joined = _product(done[-1], stage)
        if joined is None:
            done.append(stage)
        else:
            done[-1] = joined
    return done


def _product(first: Stage, second: Stage) -> Stage | None:
    if not first.bare or second.reads is not None:
        return None
    if any(s.kind not in ("panel", "strided") or s.blocks or s.ordered for s in (first, second)):
        return None
    one, two = first.block, second.block
    made = _joint(one, two)
    if made is None:
        return None
    if max(made.b, made.c) > MERGED or _size(made) > FREE_GROWTH * (_size(one) + _size(two)):
        return None
    return replace(
        second,
        kind="panel" if made.d == 1 else "strided",
        block=made,
        weights=first.weights + second.weights,
        parts=first.parts + second.parts,
        reads=first.reads,
    )


def _joint(one: Block, two: Block) -> Block | None:
    """The pattern of a product of factors, the first one applied first; None if it is no block's.

    >>> _joint(Block(2, 2, 2, 1), Block(1, 2, 2, 2)), _joint(Block(1, 2, 2, 2), Block(2, 2, 2, 1))
    (Block(a=1, b=4, c=4, d=1), Block(a=1, b=4, c=4, d=1))
    """
    if one.a % two.a == 0 and two.d % one.d == 0:
        return Block(two.a, two.b * two.d // one.d, one.c * one.a // two.a, one.d)
    if _falls(one, two):
        return Block(one.a, one.b * two.b, one.c * two.c, two.d)
    return None


def _falls(one: Block, two: Block) -> bool:
    """Whether the second factor's columns are among the first one's strides: nothing is summed."""
    return two.a == one.a * one.b and one.d == two.c * two.d


def _size(block: Block) -> int:
    return block.a * block.b * block.c * block.d


def product(blocks: Sequence[Pattern], weights: Sequence[Tensor]) -> Tensor:
    """The weight of consecutive factors that were merged, (a, b, c, d).

    >>> butterfly = [Block(2, 2, 2, 1), Block(1, 2, 2, 2)]
    >>> w = [torch.randn(2, 2, 2, 1), torch.randn(1, 2, 2, 2)]
    >>> product(butterfly, w).shape
    torch.Size([1, 4, 4, 1])
    """
    first, *others = [Block(b.a, b.b, b.c, b.d) for b in blocks]
    block, weight = first, full(blocks[0], weights[0])
    for following, other in zip(others, map(full, blocks[1:], weights[1:]), strict=True):
        rises = block.a % following.a == 0 and following.d % block.d == 0
        made = (_risen if rises else _fallen)(block, weight, following, other)
        block = _joint(block, following) or block
        weight = made.reshape(block.a, block.b, block.c, block.d)
    return weight


def _risen(block: Block, weight: Tensor, following: Block, other: Tensor) -> Tensor:
    p, s = block.a // following.a, following.d // block.d
    left = other.reshape(following.a, following.b, following.c, s, block.d)
    right = weight.reshape(following.a, p, block.b, block.c, block.d)
    # a middle feature is (p, b) for the first factor and (c, s) for the second
    made = weight.new_zeros(following.a, following.b, s, p, block.c, block.d)
    for middle in range(p * block.b):
        q, b = divmod(middle, block.b)
        c, t = divmod(middle, s)
        made[:, :, t, q] += left[:, :, c, t, None, :] * right[:, q, b][:, None]
    return made


def _fallen(block: Block, weight: Tensor, following: Block, other: Tensor) -> Tensor:
    left = other.reshape(block.a, block.b, following.b, following.c, following.d)
    right = weight.reshape(block.a, block.b, block.c, following.c, following.d)
    return torch.einsum("aprqd,apcqd->aprcqd", left, right)


def full(step: Pattern, weight: Tensor) -> Tensor:
    """A factor's weight as (a, b, c, d), also where all blocks are one."""
    if isinstance(step, Shared):
        return weight.reshape(1, step.b, step.c, 1).expand(step.a, -1, -1, step.d)
    if isinstance(step, Repeat):
        return weight.reshape(1, step.b, step.c, step.d).expand(step.a, -1, -1, -1)
    return weight.reshape(step.a, step.b, step.c, step.d)
