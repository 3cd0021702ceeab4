"""Small programs with random weights, one for each library: what a library is tested on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structc.codegen.cpu.emit import Spec
from structc.forms import (
    Act,
    Add,
    Bias,
    Block,
    Convolve,
    Displace,
    Keep,
    Mul,
    Norm,
    Permute,
    Repeat,
    Select,
    Shared,
    Sparse,
    Step,
    Tile,
)
from structc.steps import NORMS, SLOTS

WIDTH = 480
"""Features between the factors of samples."""


def sample_form(spec: Spec, *, shuffles: bool = False) -> Tile | None:
    """Odd sizes that no two factors of can be merged: every edge of the kernel is exercised.

    Args:
        spec: of the library.
        shuffles: whether shuffles stand before products where they can.

    Returns:
        The program, or None if it would take more slots than there are.
    """
    steps: list[Step] = []
    slots = iter(range(1, SLOTS - 1))
    for at, word in enumerate(spec.stages):
        kind, *tail = word.split("+")
        parts = spec.wholes[at].split("+") if spec.wholes else []
        if kind == "move" and steps and not isinstance(steps[-1], Keep):
            steps.append(Keep(steps[-1].out_features, SLOTS - 1))  # nothing joins what is kept
        if kind == "panel":
            steps += _panel(at, len(spec.stages), spec.dtype, shuffles=shuffles)
        elif kind != "move":
            steps += _OTHERS[kind](at % 2)
        n = steps[-1].out_features if steps else WIDTH
        steps += [Bias(n)] if "bias" in tail else []
        steps += [Act(t, n) for t in tail if t != "bias"]
        slot = next(slots, None) if {"mul", "add"} & set(parts) else 0
        if slot is None:
            return None
        steps += [Mul(n, slot)] if "mul" in parts else []
        steps += [Add(n, slot)] if "add" in parts else []
        steps += [Norm(n, kind, "1e-5") for kind in NORMS if kind in parts]
        if kind == "shuffle" or (kind == "move" and not tail and not any(parts)):
            steps.append(Keep(n, SLOTS - 1))
    return Tile(tuple(steps))


def _panel(at: int, count: int, dtype: torch.dtype, *, shuffles: bool) -> tuple[Step, ...]:
    """A block factor, behind a shuffle that it can read through."""
    a = 3 if at % 2 == 0 else 2
    c = 13 if at == 0 else WIDTH // a
    block = Block(a, 19 if at + 1 == count else WIDTH // a, c, 1)
    blocks = 5 if a == 3 or dtype == torch.float32 else 0
    if not shuffles or at == 0 or not blocks:
        return (block,)
    blocks = c if a == 2 else blocks  # one column of each, or several
    return Permute(blocks, WIDTH // blocks), block


_OTHERS: dict[str, Callable[[int], tuple[Step, ...]]] = {
    "strided": lambda odd: (Block(1, 12, 12, 40) if odd else Block(1, 8, 8, 60),),
    "woven": lambda odd: (
        (Permute(4, 120), Block(120, 4, 4, 1)) if odd else (Permute(5, 96), Block(96, 5, 5, 1))
    ),
    "sparse": lambda odd: (Sparse(WIDTH, WIDTH, 12, 20, 100 if odd else 3),),
    "listed": lambda odd: (Select(WIDTH, WIDTH),),
    "shuffle": lambda odd: (Permute(5, 96) if odd else Permute(32, 15),),
}


def sample(
    form: Tile, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Seeded inputs and weights of a program, scaled so that activations see both of their ends."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:  # whatever the caller's default dtype and device are
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    inputs = [noise(rows, n) for n in form.input_features]
    weights: list[Tensor] = []
    for step in form.steps:
        match step:
            case Block(a, b, c, d):
                weights.append(noise(a, b, c, d) * (1.5 / c**0.5))
            case Select(m, n):
                weights.append(torch.randint(n, (m,), generator=generator, device="cpu"))
            case Repeat(_, b, c, d):
                weights.append(noise(b, c, d) * (1.5 / c**0.5))
            case Shared(_, b, c, _):
                weights.append(noise(b, c) * (1.5 / c**0.5))
            case Convolve():
                weights.append(noise(step.taps) * (1.5 / step.taps**0.5))
            case Displace(n, r):
                weights += [noise(r, n), noise(r, n) / (n * r**0.5)]
            case Sparse():
                weights += _pattern(step, generator, noise(step.nnz, step.b, step.c))
            case _:
                weights += [noise(step.out_features) for _ in range(step.weights)]
    return inputs, weights


def _pattern(step: Sparse, generator: torch.Generator, values: Tensor) -> list[Tensor]:
    """Blocks at random places, no two at one."""
    rows, columns = step.m // step.b, step.n // step.c
    chosen = torch.randperm(rows * columns, generator=generator, device="cpu")[: step.nnz]
    chosen = chosen.sort().values
    many = torch.bincount(chosen // columns, minlength=rows)
    edges = torch.cat([many.new_zeros(1), many.cumsum(0)])
    scale = 1.5 / (step.c * max(1.0, step.nnz / rows)) ** 0.5
    return [values * scale, edges, chosen % columns]
