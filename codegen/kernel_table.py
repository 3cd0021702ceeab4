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
from structc.forms import Form, PackedDense, Spectral
from structc.records import Price, Refusal

SQUARES = (384, 768, 1024, 2048)
SHAPES = (*((n, n) for n in SQUARES), (384, 1536), (1536, 384))
ROWS = (1, 16, 128, 1024)


@dataclass(frozen=True)
class Case:
    """One matrix at one number of rows.

    Attributes:
        name: what it is, for people.
        form: the program.
        rows: of a call.
        dtype: of everything.
    """

    name: str
    form: Form
    rows: int
    dtype: torch.dtype

    @property
    def ratio(self) -> float:
        """Flops of the dense matrix over those of the form; of blocks, bytes of one row as well."""
        dense = PackedDense(self.form.in_features, self.form.out_features)
        return dense.flops / max(1, self.form.flops)


def cases(dtype: torch.dtype, rows: Sequence[int] = ROWS) -> list[Case]:
    """The table's rows, one form after the other."""
    return [Case(name, form, r, dtype) for name, form in _forms() for r in rows]


def _forms() -> Iterator[tuple[str, Form]]:
    for n, m in SHAPES:
        rank = n * m // (2 * (n + m))
        yield f"low rank 50 % {n}x{m}", _form(LowRank, n, m, rank=rank)
    for n in SQUARES:
        for grid in (4, 8):
            for share in (0.5, 0.25):
                rank = int(share * n / (2 * grid))
                made = _form(Monarch, n, n, in_blocks=grid, out_blocks=grid, rank=rank)
                yield f"Monarch {grid}x{grid} {share:.0%} {n}", made
    for n in (1024, 2048):
        for k in (4, 16, 32):
            made = _form(Monarch, n, n, in_blocks=k, out_blocks=n // k, rank=1)
            yield f"Monarch {k}x{n // k} rank 1 {n}", made
    for n in (1024, 2048, 4096):
        yield f"circulant {n}", Spectral.circulant(n)
        yield f"Toeplitz {n}", Spectral.toeplitz(n, n)


def _form(family: type[LowRank] | type[Monarch], n: int, m: int, **hyper: int) -> Form:
    return family.form_of(n, m, hyper, bias=False, activation="")


def table(
    wanted: Sequence[Case],
    peaks: Peaks,
    *,
    effort: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Each case against the best dense kernel in the same rounds.

    Returns:
        For each case plain data: times in milliseconds, ``speedup``, ``ratio`` (flops, or bytes at
        one row), ``efficiency`` (speedup over ratio), ``gflops`` and their ``share`` of the peak;
        or the reason why nothing serves it.
    """
    requests = {c: Request(c.form, c.rows, c.dtype, False, "") for c in wanted}
    found = autotune.price(list(requests.values()), effort=effort, progress=progress)
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
