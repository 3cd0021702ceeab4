"""Measure what the README says of attention: exact kernels against PyTorch's, methods against ours.

Every case is held against the float64 reference on a slice of its queries before it is timed;
everything of one line ran in turns.

    python examples/bench_attention.py
    python examples/bench_attention.py --dtype bfloat16 --cases exact
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from structc import timing
from structc.attention import BlockSparse, ConvBasis, Monarch, Polynomial, exact
from structc.numerics import relative_error

Call = Callable[[], Tensor]


@dataclass
class Case:
    """One line of the table: the first call is the baseline.

    Attributes:
        name: what is computed.
        calls: baseline and contenders by name.
        want: an output that all of them are held against; None for approximations of noise.
        aim: the speedup that was asked for, by contender.
        flops: of a call, where all contenders do the same; 0 for none.
    """

    name: str
    calls: dict[str, Call]
    want: Tensor | None = None
    aim: dict[str, str] = field(default_factory=dict)
    flops: float = 0.0


def noise(batch: int, heads: int, n: int, dtype: torch.dtype, d: int = 64) -> list[Tensor]:
    """q, k and v."""
    return [torch.randn(batch, heads, n, d).to(dtype) for _ in range(3)]


def exact_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Masks that PyTorch is given in full, and is not."""
    for n, heads in ((1024, 4), (4096, 4), (8192, 2)):
        q, k, v = noise(1, heads, n, dtype)
        for causal in (False, True):
            yield Case(
                f"{'causal' if causal else 'full'}, n {n}, {heads} heads",
                {
                    "SDPA": lambda q=q, k=k, v=v, c=causal: F.scaled_dot_product_attention(
                        q, k, v, is_causal=c
                    ),
                    "exact": lambda q=q, k=k, v=v, c=causal: exact(q, k, v, is_causal=c),
                },
                reference(q, k, v, is_causal=causal),
                {"exact": "2.2"},
                0.0 if causal else 4.0 * heads * n * n * 64,
            )
        lag = torch.arange(n)[:, None] - torch.arange(n)
        mask = (lag >= 0) & ((lag < 256) | (torch.arange(n) < 4))
        yield Case(
            f"window 256 + 4 sinks, n {n}, {heads} heads",
            {
                "SDPA": lambda q=q, k=k, v=v, m=mask: F.scaled_dot_product_attention(
                    q, k, v, attn_mask=m
                ),
                "exact": lambda q=q, k=k, v=v: exact(q, k, v, is_causal=True, window=256, sinks=4),
            },
            reference(q, k, v, is_causal=True, window=256, sinks=4),
            {"exact": {4096: "22", 8192: "48"}.get(n, "-")},
        )
    lengths = torch.linspace(16, 512, 32).long()
    q, k, v = noise(32, 4, 512, dtype)
    mask = (torch.arange(512) < lengths[:, None])[:, None, None]
    yield Case(
        "padding, 32 sequences of 16 to 512",
        {
            "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            "exact": lambda: exact(q, k, v, key_lengths=lengths),
        },
        reference(q, k, v, key_lengths=lengths),
        {"exact": "3"},
    )


def reference(q: Tensor, k: Tensor, v: Tensor, **masks: object) -> Tensor:
    """In float64, for the first sequence and head."""
    if "key_lengths" in masks:
        masks["key_lengths"] = masks["key_lengths"][:1]  # type: ignore[index]
    wide = [t[:1, :1].double() for t in (q, k, v)]
    found: Tensor = exact(*wide, **masks)  # type: ignore[call-overload]
    return found


def method_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Approximations against the exact kernel: their time does not depend on values."""
    q, k, v = noise(1, 4, 4096, dtype)
    blocks = torch.rand(1, 4, 64, 64) < 0.2
    yield Case(
        "block-sparse, density 0.2, n 4096",
        {
            "exact": lambda: exact(q, k, v),
            "blocks": lambda: exact(q, k, v, block_mask=(blocks, 64)),
            "with the estimate": lambda: BlockSparse(0.2, 64)(q, k, v),
        },
        aim={"blocks": "4"},
    )
    for n, heads, size, aim in ((4096, 4, 64, "3.5"), (16384, 1, 128, "7")):
        yield _against_exact(f"Monarch T = 2, n {n}", n, heads, Monarch(size, 2), aim, dtype)
    causal = Monarch(64, 2, is_causal=True)
    yield _against_exact("Monarch T = 2 causal, n 8192", 8192, 2, causal, "1.8", dtype)
    for many, aim, half in ((1, "6", "3"), (4, "2", "1")):
        method = ConvBasis(many)
        basis = method.recover(q, k)
        yield Case(
            f"conv basis, k = {many}, n 4096, over exact causal",
            {
                "exact": lambda: exact(q, k, v, is_causal=True),
                "apply": lambda m=method, b=basis: m.apply(b, v)[0],
                "with recovery": lambda m=method: m(q, k, v),
            },
            aim={"apply": aim, "with recovery": half},
        )
    for n, heads, aim in ((4096, 4, "3.5"), (16384, 1, "12")):
        few = Polynomial(2, 1.0, scale=0.05)
        yield _against_exact(f"polynomial p = 2 on 16 dims, n {n}", n, heads, few, aim, dtype, 16)
        few = Polynomial(2, 1.0, is_causal=True, scale=0.05)
        half = f"{float(aim) / 2:g}"
        name = f"polynomial p = 2 on 16 dims causal, n {n}"
        yield _against_exact(name, n, heads, few, half, dtype, 16)


def _against_exact(
    name: str,
    n: int,
    heads: int,
    method: Monarch | Polynomial,
    aim: str,
    dtype: torch.dtype,
    dims: int = 64,
) -> Case:
    q, k, v = noise(1, heads, n, dtype)
    few = [t[..., :dims].contiguous() for t in (q, k)]
    return Case(
        name,
        {
            "exact": lambda: exact(q, k, v, is_causal=method.is_causal),
            "method": lambda: method(*few, v),
        },
        aim={"method": aim},
    )


def growth_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Time a token, at lengths where exact attention is out of reach."""
    for n in (4096, 16384, 65536):
        q, k, v = noise(1, 1, n, dtype)
        few = [t[..., :16].contiguous() for t in (q, k)]
        yield Case(
            f"n {n}",
            {
                "conv basis, k = 1": lambda q=q, k=k, v=v: ConvBasis(1)(q, k, v),
                "polynomial": lambda few=few, v=v: Polynomial(2, 1.0, scale=0.05)(*few, v),
                "polynomial causal": lambda few=few, v=v: Polynomial(
                    2, 1.0, is_causal=True, scale=0.05
                )(*few, v),
            },
        )


GROUPS = {"exact": exact_cases, "methods": method_cases, "growth": growth_cases}


def measure(case: Case, rounds: int, tolerance: float) -> Iterator[str]:
    """The lines of a case: checked, then timed in turns.

    Errors: RuntimeError if a result is not what it should be.
    """
    for name, call in case.calls.items():
        y = call()
        if not bool(y.isfinite().all()):
            raise RuntimeError(f"{case.name}: {name} is not finite")
        if case.want is not None:
            error = relative_error(y[:1, :1], case.want)
            if error > tolerance:
                raise RuntimeError(f"{case.name}: {name} is off by {error:.1e}")
    with torch.inference_mode():
        timed = timing.interleaved(case.calls, rounds=rounds, min_sample_ms=5.0)
    base = next(iter(timed.values()))
    for name, t in timed.items():
        aim = f"aim {case.aim[name]}x" if name in case.aim else ""
        ratio = base.latency_ms / t.latency_ms
        rate = f"{1e-6 * case.flops / t.latency_ms:5.0f} GFLOP/s" if case.flops else ""
        yield (
            f"{case.name:<44} {name:<18} {t.latency_ms:9.2f} ms  spread {t.spread:4.0%}  "
            f"{ratio:6.2f}x  {aim:<10} {rate}"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cases", default="exact,methods,growth")
    parser.add_argument("--rounds", type=int, default=9, help="of each timing")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, d 64\n")
    for group in args.cases.split(","):
        for case in GROUPS[group](dtype):
            if args.only in case.name:
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                print(*measure(case, args.rounds, tolerance), sep="\n", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
