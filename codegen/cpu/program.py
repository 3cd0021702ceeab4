"""A tile program as the CPU emitter sees it: block factors one after the other, with epilogues."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structc.forms import Act, Add, Bias, Block, Norm, Permute, Step, Tile
from structc.records import Refusal

LAYOUTS = ("token", "feature")
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
MERGED = 16
"""Consecutive small factors become one whose blocks have at most this many rows and columns."""
FREE_GROWTH = 2.0
"""A merged factor may take so many times the products of its parts: calls and passes are saved."""


@dataclass(frozen=True)
class Stage:
    """One block factor as it runs, and what is done to its output.

    Attributes:
        block: the pattern, of several merged factors perhaps.
        sources: which of the program's block weights it is made of, first applied first.
        shuffled: whether its input comes through the perfect shuffle of the stage before.
        bias: whether a bias is added.
        act: the activation behind that, or ``""``.
        add: the input that is added behind that, or None.
        norm: the normalisation at the end, or None.
    """

    block: Block
    sources: tuple[int, ...]
    shuffled: bool = False
    bias: bool = False
    act: str = ""
    add: int | None = None
    norm: Norm | None = None

    @property
    def tail(self) -> str:
        """The epilogue as the emitter's word for it: ``"bias+gelu"``."""
        return "+".join(filter(None, ["bias" if self.bias else "", self.act]))

    @property
    def rows_tail(self) -> str:
        """What is done to whole rows, as the emitter's word for it: ``"add+layer"``."""
        kind = "" if self.norm is None else self.norm.kind
        return "+".join(filter(None, ["" if self.add is None else "add", kind]))

    @property
    def bare(self) -> bool:
        """Whether the product goes on as it is."""
        return not self.tail and not self.rows_tail


@dataclass(frozen=True)
class Program:
    """Stages of a tile program.

    Attributes:
        stages: in the order in which they run.
    """

    stages: tuple[Stage, ...]

    @property
    def in_features(self) -> int:
        return self.stages[0].block.in_features

    @property
    def out_features(self) -> int:
        return self.stages[-1].block.out_features


def analyse(form: Tile, layout: str, dtype: torch.dtype = torch.float32) -> Program | Refusal:
    """The program's stages, or why no kernel of this layout is emitted for it.

    >>> analyse(Tile.parse("block(1,8,32,1) block(1,32,8,1) act(relu,32)"), "token").stages[-1].act
    'relu'
    """
    if dtype not in DTYPES:
        return _refuse("DTYPE", f"emitted kernels are float32 or bfloat16, not {dtype}")
    stages = _stages(list(form.steps))
    if stages is None:
        return _refuse("STEPS", f"{form}: not block factors with shuffles and epilogues")
    program = Program(tuple(_merged(stages)))
    return _unserved(program, layout, dtype) or program


def _stages(steps: list[Step]) -> list[Stage] | None:
    """One stage for each block factor; None if something else stands between them."""
    stages: list[Stage] = []
    shuffled = False
    for step in steps:
        if isinstance(step, Block):
            stages.append(Stage(step, (len(stages),), shuffled))
            shuffled = False
            continue
        last = stages[-1] if stages else None
        if last is None or shuffled:
            return None
        match step:
            case Permute(p, q) if last.bare and (p, q, 1) == (
                last.block.a,
                last.block.b,
                last.block.d,
            ):
                shuffled = p > 1 and q > 1
            case Bias() if last.bare:
                stages[-1] = replace(last, bias=True)
            case Act(fn, _) if not last.act and not last.rows_tail:
                stages[-1] = replace(last, act=fn)
            case Add(_, index) if not last.rows_tail:
                stages[-1] = replace(last, add=index)
            case Norm() if last.norm is None:
                stages[-1] = replace(last, norm=step)
            case _:
                return None
    return None if shuffled or not stages else stages


# ---------------------------------------------------------------------------- merging


def _merged(stages: list[Stage]) -> list[Stage]:
    """Neighbours whose product is a block factor of small blocks, as one stage.

    A butterfly of ten factors of 2 x 2 becomes three of 16 x 16 and less: each pass over a tile
    then does enough arithmetic for what it loads.
    """
    done = [stages[0]]
    for stage in stages[1:]:
        joined = _join(done[-1], stage)
        if joined is None:
            done.append(stage)
        else:
            done[-1] = joined
    return done


def _join(first: Stage, second: Stage) -> Stage | None:
    if not first.bare or first.shuffled or second.shuffled:
        return None
    one, two = first.block, second.block
    if min(one.a, one.b, one.c, one.d, two.a, two.b, two.c, two.d) < 1:
        return None
    if one.a % two.a or two.d % one.d:
        return None
    made = Block(two.a, two.b * two.d // one.d, one.c * one.a // two.a, one.d)
    if max(made.b, made.c) > MERGED or _size(made) > FREE_GROWTH * (_size(one) + _size(two)):
        return None
    return replace(second, block=made, sources=first.sources + second.sources)


def _size(block: Block) -> int:
    return block.a * block.b * block.c * block.d


def product(blocks: list[Block], weights: list[Tensor]) -> Tensor:
    """The weight of consecutive factors that were merged, (a, b, c, d).

    >>> butterfly = [Block(2, 2, 2, 1), Block(1, 2, 2, 2)]
    >>> w = [torch.randn(2, 2, 2, 1), torch.randn(1, 2, 2, 2)]
    >>> product(butterfly, w).shape
    torch.Size([1, 4, 4, 1])
    """
    block, weight = blocks[0], weights[0].reshape(*_shape(blocks[0]))
    for following, other in zip(blocks[1:], weights[1:], strict=True):
        p, s = block.a // following.a, following.d // block.d
        left = other.reshape(following.a, following.b, following.c, s, block.d)
        right = weight.reshape(following.a, p, block.b, block.c, block.d)
        # a middle feature is (p, b) for the first factor and (c, s) for the second
        made = weight.new_zeros(following.a, following.b, s, p, block.c, block.d)
        for middle in range(p * block.b):
            q, b = divmod(middle, block.b)
            c, t = divmod(middle, s)
            made[:, :, t, q] += left[:, :, c, t, None, :] * right[:, q, b][:, None]
        block = Block(following.a, following.b * s, p * block.c, block.d)
        weight = made.reshape(*_shape(block))
    return weight


def _shape(block: Block) -> tuple[int, int, int, int]:
    return block.a, block.b, block.c, block.d


# ---------------------------------------------------------------------------- what is served


def _unserved(program: Program, layout: str, dtype: torch.dtype) -> Refusal | None:
    blocks = [stage.block for stage in program.stages]
    if min(min(_shape(b)) for b in blocks) < 1:
        return _refuse("EMPTY", "a block factor without elements has no emitted kernel")
    for before, stage in zip(program.stages, program.stages[1:], strict=False):
        if stage.shuffled and layout == "token" and stage.block.d > 1:
            return _refuse("STRIDED", "a shuffle stands before a factor with d > 1")
        if stage.shuffled and layout == "token" and stage.block.c % before.block.a:
            return _refuse(
                "SPLIT",
                f"groups of {stage.block.c} do not take whole parts of {before.block.a} blocks",
            )
    if dtype == torch.bfloat16:
        if layout == "feature":
            return _refuse("LAYOUT", "the feature layout is float32 alone")
        odd = [b.c for b in blocks if b.c % 2 and b.d == 1]
        if odd:
            return _refuse("ODD", f"bfloat16 products take pairs of inputs, a block has {odd[0]}")
    if layout == "feature":
        if not all(s.bare for s in program.stages[:-1]):
            return _refuse("LAYOUT", "the feature layout has no epilogues between factors")
        if program.stages[-1].rows_tail:
            return _refuse("LAYOUT", "the feature layout adds and normalises nothing")
    return None


def _refuse(code: str, reason: str) -> Refusal:
    return Refusal("", "tile", code, reason)
