"""Every GPU kernel against float64, then against cuBLAS, torch.compile and SDPA: one script.

Correctness comes first: where one kernel is wrong, the table says which, no speedup is printed and
the exit status is 1. Times are the GPU's own, of calls in turns; medians and the spread between
quartiles. Without a GPU the kernels run on small shapes under Triton's interpreter: correctness
alone, nothing is timed.

    python examples/bench_gpu.py --json gpu.json
    python examples/bench_gpu.py --dtype float16 --only attention
    python examples/bench_gpu.py --model model.py:make --artifact out
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], object]
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
ROUNDS = 30


@dataclass
class Case:
    """One line: what is checked, and what is timed against it.

    Attributes:
        name: what is computed.
        ours: by structc's operator, giving the tensors that are checked.
        want: the same in float64.
        others: baselines by name.
    """

    name: str
    ours: Callable[[], Sequence[Tensor]]
    want: Callable[[], Sequence[Tensor]]
    others: dict[str, Call] = field(default_factory=dict)


@dataclass
class Row:
    """What became of a case; times in microseconds, medians and spreads by version."""

    name: str
    error: float
    passed: bool
    times: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)


# ---------------------------------------------------------------------------- tile programs


def programs(tiny: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Programs and the numbers of rows that they are called with."""
    if tiny:
        return {
            "low rank": ("block(1,18,70,1) block(1,33,18,1) bias(33)", (1, 9)),
            "Monarch": ("block(4,12,10,1) permute(4,12) block(12,5,4,1)", (3, 9)),
            "BLAST": ("block(3,18,7,1) block(1,4,3,18) block(4,6,18,1)", (9,)),
            "block sparse": ("sparse(24,40,6,8,7) bias(24)", (9,)),
            "butterfly": ("block(4,2,2,1) block(2,2,2,2) block(1,2,2,4)", (9,)),
            "dense, GELU, norm": ("block(1,24,12,1) act(gelu,24) norm(24,layer,1e-05)", (9,)),
        }
    rows = (1, 16, 256, 4096)
    return {
        "low rank 128 of 4096": ("block(1,128,4096,1) block(1,4096,128,1)", rows),
        "low rank 512 of 4096": ("block(1,512,4096,1) block(1,4096,512,1)", rows),
        "Monarch 32x32, 4096": ("block(32,32,128,1) permute(32,32) block(32,128,32,1)", rows),
        "BLAST 16x16 r64, 4096": (
            "block(16,64,256,1) block(1,16,16,64) block(16,256,64,1)", (256, 4096),
        ),
        "block sparse 1/8, 4096": ("sparse(4096,4096,64,64,512)", (256, 4096)),
        "butterfly 4096": (
            " ".join(f"block({2048 >> i},2,2,{1 << i})" for i in range(12)), (256, 4096),
        ),
        "dense 4096, GELU": ("block(1,4096,4096,1) bias(4096) act(gelu,4096)", rows),
    }  # fmt: skip


def tile_cases(device: str, dtype: torch.dtype, *, tiny: bool) -> Iterator[Case]:
    """Structured products against the dense one of the same sizes."""
    from structc import ops
    from structc.codegen.cpu.samples import sample
    from structc.forms import Tile
    from structc.reference import tile_reference

    for name, (text, every) in programs(tiny).items():
        form = Tile.parse(text)
        text = str(form)
        for rows in every:
            inputs, weights = sample(form, rows=rows, dtype=dtype)
            x, factors = inputs[0].to(device), [w.to(device) for w in weights]
            dense = torch.randn(form.out_features, x.shape[1], device=device).to(dtype)
            act = F.gelu if "gelu" in text else (lambda y: y)

            def want(x: Tensor = x, w: Sequence[Tensor] = factors, t: str = text) -> list[Tensor]:
                wide = [f.double() if f.is_floating_point() else f for f in w]
                return [tile_reference(x.double(), wide, t)]

            def product(x: Tensor = x, w: Tensor = dense, a: Any = act) -> Tensor:
                return a(F.linear(x, w))  # type: ignore[no-any-return]

            yield Case(
                f"{name}, {rows} rows",
                lambda x=x, w=factors, t=text: ops.tile([x], w, t),
                want,
                {"dense": product, "dense, compiled": compiled(product, tiny)},
            )


def compiled(call: Call, tiny: bool) -> Call:
    """Under torch.compile; as it is where nothing is timed."""
    return call if tiny else torch.compile(call, mode="max-autotune-no-cudagraphs")


# ---------------------------------------------------------------------------- attention


def attention_cases(device: str, dtype: torch.dtype, *, tiny: bool) -> Iterator[Case]:
    """Exact attention, forward and with gradients, against SDPA."""
    from structc.attention import exact

    sizes = ((2, 2, 33, 16),) if tiny else ((2, 16, 4096, 64), (1, 16, 8192, 128))
    for b, h, n, d in sizes:
        q, k, v = (torch.randn(b, h, n, d, device=device).to(dtype) for _ in range(3))
        rules: dict[str, dict[str, Any]] = {
            "causal": {"is_causal": True},
            "window": {"is_causal": True, "window": max(4, n // 16), "sinks": 4},
            "full": {},
        }
        for name, rule in rules.items():
            mask = seen(n, rule, device) if name == "window" else None

            def ours(r: Any = rule, s: Any = (q, k, v)) -> Sequence[Tensor]:
                return exact(*s, **r, return_lse=True)

            def want(r: Any = rule, s: Any = (q, k, v)) -> Sequence[Tensor]:
                return exact(*(t.double() for t in s), **r, return_lse=True)

            def sdpa(r: Any = rule, s: Any = (q, k, v), m: Any = mask) -> Tensor:
                causal = bool(r.get("is_causal")) and m is None
                return F.scaled_dot_product_attention(*s, attn_mask=m, is_causal=causal)

            label = f"attention {name}, n {n}, d {d}"
            yield Case(label, ours, want, {"SDPA": sdpa})
            yield Case(
                f"{label}, gradients",
                lambda f=ours, s=(q, k, v): gradients(lambda *t: f(s=t)[0], s),
                lambda f=ours, s=(q, k, v): gradients(lambda *t: f(s=t)[0], s, wide=True),
                {"SDPA": lambda f=sdpa, s=(q, k, v): gradients(lambda *t: f(s=t), s)},
            )


def method_cases(device: str, dtype: torch.dtype, *, tiny: bool) -> Iterator[Case]:
    """Attention methods against SDPA on the same q, k and v, whose attention they approximate."""
    from structc.attention import Monarch, Polynomial, SparseLowRank

    b, h, n, d = (1, 2, 33, 8) if tiny else (2, 16, 8192, 64)
    q, k, v = (torch.randn(b, h, n, d, device=device).to(dtype) for _ in range(3))
    scale, block = 0.3 / d, 4 if tiny else 64
    methods: dict[str, tuple[Any, bool]] = {
        "polynomial of degree 2": (Polynomial(2, scale=scale), True),
        "polynomial of degree 2, causal": (Polynomial(2, is_causal=True, scale=scale), True),
        "window + polynomial, causal": (SparseLowRank(128, 4, is_causal=True, scale=scale), False),
        f"Monarch, blocks of {block}": (Monarch(block, 2), False),
    }
    for name, (method, graded) in methods.items():
        causal = bool(method.is_causal)

        def ours(m: Any = method, s: Any = (q, k, v)) -> Sequence[Tensor]:
            return [m(*s)]

        def want(m: Any = method, s: Any = (q, k, v)) -> Sequence[Tensor]:
            return [m(*(t.double() for t in s))]

        def sdpa(c: bool = causal, s: Any = (q, k, v)) -> Tensor:
            return F.scaled_dot_product_attention(*s, is_causal=c)

        yield Case(f"{name}, n {n}, d {d}", ours, want, {"SDPA": sdpa})
        if graded:
            yield Case(
                f"{name}, n {n}, gradients",
                lambda m=method, s=(q, k, v): gradients(m, s),
                lambda m=method, s=(q, k, v): gradients(m, s, wide=True),
                {"SDPA": lambda f=sdpa, s=(q, k, v): gradients(lambda *t: f(s=t), s)},
            )


def seen(n: int, rule: dict[str, Any], device: str) -> Tensor:
    """The mask that SDPA needs where it has no rule."""
    i = torch.arange(n, device=device)
    near = i[None] > i[:, None] - rule["window"]
    return (near | (i < rule["sinks"])[None]) & (i[None] <= i[:, None])


def gradients(call: Any, sides: Sequence[Tensor], *, wide: bool = False) -> Sequence[Tensor]:
    """Of the sum of squares, with respect to q, k and v."""
    leaves = [(t.double() if wide else t).detach().requires_grad_() for t in sides]
    return torch.autograd.grad(call(*leaves).square().sum(), leaves)


# ---------------------------------------------------------------------------- whole models


def model_cases(model: str, artifact: str, device: str) -> Iterator[Case]:
    """A converted model against itself as it was: eager and compiled."""
    import structc
    from structc.inputs import example_call
    from structc.sources import load_source
    from structc.sources.source import TextOptions

    source = load_source(model, TextOptions(), trust=False)
    example = example_call(source.model.eval(), source.example_inputs)
    assert example is not None, "the model brings no example inputs"
    fast = structc.load(artifact, source.model)
    inputs = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to(device), (example.args, dict(example.kwargs))
    )
    with torch.no_grad():
        want = tensors(fast(*example.args, **example.kwargs))  # on the CPU, before it moves
    fast, original = fast.to(device), source.model.to(device)
    quick = torch.compile(original)

    def run(module: Any) -> Sequence[Tensor]:
        with torch.no_grad():
            return tensors(module(*inputs[0], **inputs[1]))

    yield Case(
        f"{model} as {artifact}",
        lambda: run(fast),
        lambda: [t.double().to(device) for t in want],
        {"eager": lambda: run(original), "torch.compile": lambda: run(quick)},
    )


def tensors(found: Any) -> list[Tensor]:
    """All that a model gives."""
    leaves = torch.utils._pytree.tree_leaves(found)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


# ---------------------------------------------------------------------------- measuring


def checked(case: Case, tolerance: float) -> Row:
    """The largest relative error of a case's tensors."""
    from structc.numerics import relative_error

    got, want = case.ours(), case.want()
    assert len(got) == len(want) > 0
    error = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
    return Row(case.name, error, error <= tolerance)


def timed(case: Case, row: Row) -> None:
    """Medians and spreads of all versions, in turns."""
    from structc.codegen.triton.timing import WARM, seconds

    calls: dict[str, Call] = {"structc": case.ours, **case.others}
    for call in calls.values():
        for _ in range(WARM):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(1e6 * seconds(call))
    for name, found in samples.items():
        low, middle, high = statistics.quantiles(found, n=4)
        row.times[name], row.spreads[name] = middle, (high - low) / middle


def table(rows: Sequence[Row], *, gate: bool) -> str:
    """For people; without speedups where the gate is red."""
    lines = [f"{'case':<46} {'error':>8}      {'us':>9}  against"]
    for row in rows:
        told = "ok" if row.passed else "WRONG"
        line = f"{row.name:<46} {row.error:>8.1e} {told:<5}"
        if gate and row.times:
            own = row.times["structc"]
            line += f"{own:>9.1f}  "
            line += ", ".join(
                f"{name} {us / own:.2f}x" for name, us in row.times.items() if name != "structc"
            )
        lines.append(line.rstrip())
    return "\n".join(lines)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """The CPU's operators look for Triton's kernels; under the interpreter, they run."""
    from structc import attend, ops
    from structc.attention import kernels

    tables = (ops.BACKENDS, attend.BACKENDS, kernels.BACKENDS)
    before = [dict(found) for found in tables]
    for found in tables:
        found["cpu"] = found["cuda"]
    attend.forget()
    ops.search_again()
    try:
        yield
    finally:
        for found, old in zip(tables, before, strict=True):
            found.clear()
            found.update(old)
        attend.forget()
        ops.search_again()


def run(arguments: argparse.Namespace) -> int:
    """The exit status."""
    from structc.codegen.triton.attempt import failures

    gpu = torch.cuda.is_available()
    device, dtype = "cuda" if gpu else "cpu", getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    cases: list[Case] = []
    if arguments.only in ("", "tile"):
        cases += tile_cases(device, dtype, tiny=not gpu)
    if arguments.only in ("", "attention"):
        cases += attention_cases(device, dtype, tiny=not gpu)
    if arguments.only in ("", "methods"):
        cases += method_cases(device, dtype, tiny=not gpu)
    if arguments.model:
        cases += model_cases(arguments.model, arguments.artifact, device)
    rows = [checked(case, TOLERANCE[arguments.dtype]) for case in cases]
    gate = all(row.passed for row in rows) and not failures()
    if gpu and gate:
        for case, row in zip(cases, rows, strict=True):
            timed(case, row)
    name = torch.cuda.get_device_name() if gpu else "Triton's interpreter, nothing is timed"
    print(f"{name}, {arguments.dtype}, torch {torch.__version__}\n")
    print(table(rows, gate=gate))
    for failure in failures():
        print(f"did not run: {failure.what} as {failure.way}: {failure.reason}")
    if not gate:
        print("\nA kernel is wrong or does not run: no speedups.", file=sys.stderr)
    if arguments.json:
        data = {"device": name, "dtype": arguments.dtype, "torch": torch.__version__,
                "passed": gate, "failures": [asdict(f) for f in failures()],
                "rows": [asdict(r) for r in rows]}  # fmt: skip
        arguments.json.write_text(json.dumps(data, indent=1))
    return 0 if gate else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=list(TOLERANCE))
    parser.add_argument("--only", default="", choices=["", "tile", "attention", "methods", "model"])
    parser.add_argument("--model", default="", help="file.py:factory or a folder, with --artifact")
    parser.add_argument("--artifact", default="", help="what structc convert wrote of the model")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    arguments = parser.parse_args(argv)
    if bool(arguments.model) != bool(arguments.artifact):
        parser.error("--model and --artifact go together")
    if torch.cuda.is_available():
        return run(arguments)
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with interpreted():
        return run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
