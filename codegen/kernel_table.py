"""What each form's kernel reaches on this machine: the cases of ``structc bench kernels``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from structc import hardware
from structc.codegen import autotune
from structc.codegen.autotune import Request
from structc.codegen.peaks import Peaks
from structc.families import LowRank, Monarch
from structc.forms import (
    Act,
    Add,
    Bias,
    Block,
    Convolve,
    Form,
    Keep,
    Load,
    Norm,
    PackedDense,
    Sparse,
    Step,
    Tile,
)
from structc.records import Price, Refusal

ROWS = (1, 16, 128, 1024)
FEW, MANY = (1, 16), (128, 1024)
SQUARES = (384, 768, 1024, 2048)
SHAPES = (*((n, n) for n in SQUARES), (384, 1536), (1536, 384))


@dataclass(frozen=True)
class Case:
    """One matrix, or a chain of them, at one number of rows.

    Attributes:
        name: what it is, for people.
        form: the program.
        rows: of a call.
        dtype: of everything.
        of: the dense chain that it stands for; None for one matrix.
    """

    name: str
    form: Form
    rows: int
    dtype: torch.dtype
    of: Tile | None = None

    @property
    def ratio(self) -> float:
        """Flops of the dense matrix over those of the form; of blocks, bytes of one row as well."""
        dense = PackedDense(self.form.in_features, self.form.out_features)
        return (dense if self.of is None else self.of).flops / max(1, self.form.flops)


def cases(dtype: torch.dtype, rows: Sequence[int] = ROWS) -> list[Case]:
    """The table's rows, one form after the other."""
    chains = ((f"MLP {name}", form, MANY, dense) for name, form, dense in _mlps())
    every = [*((*one, None) for one in _forms()), *chains]
    return [
        Case(name, form, r, dtype, of) for name, form, some, of in every for r in rows if r in some
    ]


def _forms() -> Iterator[tuple[str, Form, Sequence[int]]]:
    """Name, form, and the numbers of rows that are asked of it."""
    for n, m in (*SHAPES, (4096, 4096)):
        rank = n * m // (2 * (n + m))
        yield f"low rank 50 % {n}x{m}", _form(LowRank, n, m, rank=rank), FEW if n > 2048 else ROWS
    for n in (*SQUARES, 4096):
        for grid in (4, 8):
            for share in (0.5, 0.25):
                rank = int(share * n / (2 * grid))
                made = _form(Monarch, n, n, in_blocks=grid, out_blocks=grid, rank=rank)
                yield f"Monarch {grid}x{grid} {share:.0%} {n}", made, FEW if n > 2048 else ROWS
    for n in (1024, 2048):
        for k in (4, 16, 32):
            made = _form(Monarch, n, n, in_blocks=k, out_blocks=n // k, rank=1)
            yield f"Monarch {k}x{n // k} rank 1 {n}", made, ROWS
    for n in (1024, 2048):
        for b in (4, 8):
            rank = n * n // (2 * (2 * n + b * b))
            parts = (Block(b, rank, n // b, 1), Block(1, b, b, rank), Block(b, n // b, rank, 1))
            yield f"BLAST {b}x{b} 50 % {n}", Tile(parts), ROWS
    for n in (1024, 2048, 4096):
        yield f"circulant {n}", Tile((Convolve.circulant(n),)), ROWS
        yield f"Toeplitz {n}", Tile((Convolve.toeplitz(n, n),)), ROWS
    levels = (Block(512 >> level, 2, 2, 1 << level) for level in range(10))
    yield "butterfly 1024, 10 factors", Tile(tuple(levels)), ROWS
    yield "pixelated butterfly 25 % 1024", _pixelated(1024, 32, 64), ROWS


def _pixelated(n: int, block: int, rank: int) -> Tile:
    """A flat block butterfly with a low-rank part: the sum of two branches."""
    side = n // block
    sparse = Sparse(n, n, block, block, side * side.bit_length())
    low_rank = (Block(1, rank, n, 1), Block(1, n, rank, 1))
    return Tile((sparse, Keep(n, 1), Load(n, 0), *low_rank, Add(n, 1)))


def _mlps() -> Iterator[tuple[str, Tile, Tile]]:
    """A transformer's feed-forward part, 384 - 1536 - 384, low-rank and dense."""
    n, h = 384, 1536

    def chain(up: tuple[Block, ...], down: tuple[Block, ...]) -> Tile:
        middle: tuple[Step, ...] = (*up, Bias(h), Act("gelu", h), *down, Bias(n))
        return Tile((*middle, Add(n, 0), Norm(n, "layer", "1e-12")))

    dense = chain((Block(1, h, n, 1),), (Block(1, n, h, 1),))
    yield "dense", dense, dense
    for rank in (144, 80):
        up = (Block(1, rank, n, 1), Block(1, h, rank, 1))
        down = (Block(1, rank, h, 1), Block(1, n, rank, 1))
        yield f"low rank {rank}", chain(up, down), dense


def _form(family: type[LowRank] | type[Monarch], n: int, m: int, **hyper: int) -> Form:
    return family.form_of(n, m, hyper, bias=False, activation="")


def table(
    wanted: Sequence[Case],
    peaks: Peaks,
    *,
    effort: str,
    seconds: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Each case against the best dense kernel in the same rounds.

    Returns:
        For each case plain data: times in milliseconds, ``speedup``, ``ratio`` (flops, or bytes at
        one row), ``efficiency`` (speedup over ratio), ``gflops`` and their ``share`` of the peak;
        or the reason why nothing serves it.
    """
    requests = {
        c: Request(c.form, c.rows, c.dtype, False, "", of="" if c.of is None else str(c.of))
        for c in wanted
    }
    found = autotune.price(
        list(requests.values()), effort=effort, seconds=seconds, progress=progress
    )
    return [_row(case, found[requests[case]], peaks) for case in wanted]


def _row(case: Case, price: Price | Refusal, peaks: Peaks) -> dict[str, Any]:
    row: dict[str, Any] = {
        "case": case.name,
        "form": str(case.form),
        "rows": case.rows,
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": hardware.target().threads,
        "ratio": case.ratio,
    }
    if isinstance(price, Refusal):
        return {**row, "refused": f"{price.code}: {price.reason}"}
    gflops = 1e-6 * case.rows * case.form.flops / price.latency_ms
    return {
        **row,
        **{k: v for k, v in asdict(price).items() if k not in ("form", "bucket")},
        "speedup": price.speedup,
        "efficiency": price.speedup / case.ratio,
        "gflops": gflops,
        "share": gflops / peaks.of(case.dtype),
    }
