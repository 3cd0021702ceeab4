"""Polynomial attention and its gradient on Triton kernels, the state a chunk at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structc.attention.feature_sums import Rule, monomials
from structc.codegen.triton import load
from structc.codegen.triton.aot import Job
from structc.codegen.triton.attempt import Attempts
from structc.codegen.triton.config import DOT, Config, power_above
from structc.codegen.triton.device import name_here
from structc.codegen.triton.entry import Entry
from structc.codegen.triton.polynomial_source import LENGTHS, POINTERS, SOURCE, STRIDES
from structc.codegen.triton.spilled import usable
from structc.codegen.triton.tile import DTYPES, dot_dtype, rounds
from structc.records import Refusal

WIDEST = 128
"""Numbers of a head."""
CHUNK = 128
"""Tokens of a chunk at least; tiles divide it."""
CONFIGS = (
    Config(64, 64, 64, 4, 2), Config(64, 64, 32, 4, 2), Config(64, 32, 32, 4, 2),
    Config(32, 64, 32, 4, 2), Config(32, 32, 32, 4, 2), Config(32, 32, 32, 4, 1),
    Config(32, 32, 16, 8, 1), Config(16, 32, 32, 4, 1), Config(16, 32, 16, 8, 1),
    Config(32, 16, 16, 8, 1), Config(16, 16, 16, 8, 1), Config(16, 16, 16, 4, 1),
)  # fmt: skip
"""Queries, keys and monomials of a tile, warps, stages."""
KERNELS = tuple(POINTERS)
SHARED = {"states": "bk", "outputs": "bm", "queries": "bm", "keys": "bn"}
"""The side of a tile that programs of a head are cut by."""


class Given(NamedTuple):
    """What all kernels of a call share.

    Attributes:
        places: ``(degree, count)``, the feature of each factor of a monomial; d where it has none.
        weights: of each monomial.
        slopes: of each head, how a pair's weight falls by lag; any tensor without.
        f: coefficients, the constant first.
        causal, decay: what there is.
        chunk: tokens.
        short: whether neither queries nor keys fill more than one.
    """

    places: Tensor
    weights: Tensor
    slopes: Tensor
    f: Tensor
    causal: bool
    decay: bool
    chunk: int
    short: bool


@dataclass(frozen=True, eq=False)
class PolynomialKernel:
    """``(q, k, v, rule, weights, decay) -> (o, z)``, z what rows were divided by; or None."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, rule: Rule, weights: Tensor, decay: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        if not serves(q, k, v):
            return None
        given = given_of(q, k, rule, weights, decay)
        o = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        z = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        q, k, v = (side(t) for t in (q, k, v))
        before = _needed(k, v, given)
        if before is None:
            return None
        tables = [given.places, given.weights, given.slopes, given.f]
        done = _run("outputs", [q, k, v, *tables, *before, o, z], (q, k, v), given)
        return (o, z) if done else None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rule: Rule,
        weights: Tensor,
        decay: Tensor | None,
        o: Tensor,
        z: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Gradients of q, k and v, or None where they are not served."""
        given = given_of(q, k, rule, weights, decay)
        dots = (grad.float() * o.float()).sum(-1)
        q, k, v, grad = (side(t) for t in (q, k, v, grad.to(q.dtype)))
        found = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
        before, behind = _needed(k, v, given), _needed(q, grad, given, (z, dots))
        if before is None or behind is None:
            return None
        tables = [given.places, given.weights, given.slopes, given.f]
        inputs = [q, k, v, grad, z, dots, *tables]
        for kernel, sums, out in (("queries", before, found[:1]), ("keys", behind, found[1:])):
            if not _run(kernel, [*inputs, *sums, *out], (q, k, v, grad), given):
                return None
        return found[0], found[1], found[2]


def chunk_of(count: int, length: int, causal: bool) -> int:
    """Tokens of a chunk: about a quarter of the monomials, so that its own keys, met as scores,
    take no longer than the state; all where none is hidden.

    >>> chunk_of(2145, 4096, True), chunk_of(153, 4096, True), chunk_of(153, 4096, False)
    (640, 128, 4096)
    """
    whole = -(-length // CHUNK) * CHUNK
    return min(whole, max(CHUNK, -(-count // 4 // CHUNK) * CHUNK)) if causal else whole


def product_of(dtype: torch.dtype) -> Any:
    """The dtype that factors of products are rounded to.

    In float16 sums over all keys have no room: they are float32, multiplied with 10 bits.
    """
    return dot_dtype(torch.float32 if dtype == torch.float16 else dtype)


def ten_bits(dtype: torch.dtype) -> bool:
    """Whether factors are rounded so far: those of float16 are, and float32's where one may."""
    return dtype == torch.float16 or rounds(dtype)


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there are kernels for these."""
    same = q.dtype == k.dtype == v.dtype and q.dtype in DTYPES
    return same and max(q.shape[-1], v.shape[-1]) <= WIDEST and bool(q.numel() and k.numel())


def given_of(q: Tensor, k: Tensor, rule: Rule, weights: Tensor, decay: Tensor | None) -> Given:
    """Tables of a call, made once for each device."""
    places = _places(q.shape[-1], rule.degree, q.device)
    weights = weights.to(q.device, torch.float32).contiguous()
    f = _coefficients(rule.a, q.device)
    slopes = weights if decay is None else decay.to(q.device, torch.float32).contiguous()
    length = max(q.shape[2], k.shape[2])
    chunk = chunk_of(len(weights), length, rule.causal)
    short = length <= chunk
    return Given(places, weights, slopes, f, rule.causal, decay is not None, chunk, short)


@functools.lru_cache(maxsize=32)
def _coefficients(a: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(a, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=32)
def _places(d: int, degree: int, device: torch.device) -> Tensor:
    """Of each monomial's factors the features, ``(degree, count)``; d where there is none."""
    chosen, _ = monomials(d, degree)
    rows = [(*c, *[d] * (degree - len(c))) for c in chosen]
    return torch.tensor(rows, dtype=torch.int32, device=device).T.contiguous()


def side(t: Tensor) -> Tensor:
    """Numbers of a head side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _needed(
    x: Tensor, y: Tensor, given: Given, back: tuple[Tensor, Tensor] | None = None
) -> list[Tensor] | None:
    """The states of a call; none where all tokens are one chunk: nothing stands before it."""
    if given.causal and given.short:
        return [given.weights, given.weights]  # nothing reads them
    return states(x, y, given, back)


def states(
    x: Tensor,
    y: Tensor,
    given: Given,
    back: tuple[Tensor, Tensor] | None = None,
    *,
    skip: int = 0,
    kept: torch.dtype | None = None,
) -> list[Tensor] | None:
    """Sums of monomials of x times y before each chunk, and those times 1.

    Args:
        back: z and dots: what stands behind each chunk instead, of ``y / z`` and ``-dots / z``.
        skip: first tokens that are left out.
        kept: dtype of the sums; that of products without.
    """
    chunk = given.chunk
    b, h, n, e = y.shape
    count, chunks = given.places.shape[1], -(-n // chunk)
    kept = kept or (torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
    state = torch.empty(b, h, chunks + 1, count, e, dtype=kept, device=x.device)
    mass = torch.empty(b, h, chunks + 1, count, dtype=torch.float32, device=x.device)
    tensors = [x, y, *(back or (mass, mass)), given.places, given.slopes, state, mass]
    numbers = [h, n, skip, chunk, chunks, count, x.shape[3], e]
    done = _launch(
        "states", count, tensors, (x, y), numbers, DEGREE=len(given.places),
        BACK=back is not None, DECAY=given.decay, WIDE=wide(e),
    )  # fmt: skip
    return [state, mass] if done else None


def wide(d: int) -> int:
    """A size as products take it."""
    return max(DOT, power_above(d))


def _run(kernel: str, tensors: list[Tensor], inputs: Sequence[Tensor], given: Given) -> bool:
    """Launch a kernel of queries or keys."""
    q, k, v = inputs[:3]
    summed = q if kernel == "keys" else k
    numbers = [
        q.shape[1], q.shape[2], k.shape[2], given.chunk, -(-summed.shape[2] // given.chunk),
        given.places.shape[1], q.shape[3], v.shape[3],
    ]  # fmt: skip
    return _launch(
        kernel, (k if kernel == "keys" else q).shape[2], tensors, inputs, numbers,
        DEGREE=len(given.places), CAUSAL=given.causal, DECAY=given.decay,
        WD=wide(q.shape[3]), WIDE=wide(v.shape[3]),
    )  # fmt: skip


def _launch(
    kernel: str,
    many: int,
    tensors: list[Tensor],
    inputs: Sequence[Tensor],
    numbers: list[int],
    **sizes: Any,
) -> bool:
    """Run a kernel with the first config that it runs with; False if there is none.

    Args:
        kernel: of :data:`KERNELS`.
        many: tokens or monomials of a head, which its programs share.
        tensors, numbers: in order; strides of ``inputs`` stand between them.
        sizes: compile-time arguments beside tiles.
    """
    module = load.module_of(SOURCE)
    if isinstance(module, Refusal):
        return False
    strides = [t.stride(at) for t in inputs for at in range(3)]
    heads, dtype = inputs[0].shape[0] * inputs[0].shape[1], inputs[0].dtype

    def call(config: Config) -> bool:
        grid = (heads * -(-many // getattr(config, SHARED[kernel])),)
        getattr(module, f"polynomial_{kernel}")[grid](
            *tensors, *strides, *numbers, **_tiles(kernel, config), **sizes, DOT=product_of(dtype),
            TF32=ten_bits(dtype), num_warps=config.warps, num_stages=config.stages,
            **load.FUSED,
        )  # fmt: skip
        return True

    with torch.cuda.device_of(tensors[0]):
        return bool(_left(kernel, dtype, tuple(sorted(sizes.items()))).run(call))


def _tiles(kernel: str, config: Config) -> dict[str, int]:
    """Compile-time sizes of a tile."""
    return config.constexprs(("BN", "BK") if kernel == "states" else ("BM", "BN", "BK"))


_tried: dict[tuple[Any, ...], Attempts[Config]] = {}


def _left(kernel: str, dtype: torch.dtype, sizes: tuple[Any, ...]) -> Attempts[Config]:
    key = (kernel, dtype, sizes)
    if key not in _tried:
        width = width_of(dict(sizes))
        some = usable(f"polynomial_{kernel}", width, CONFIGS, DTYPES[dtype], name_here())
        _tried[key] = Attempts(f"polynomial_{kernel} in {dtype}, {dict(sizes)}", some)
    return _tried[key]


def width_of(sizes: Mapping[str, Any]) -> int:
    """Numbers of a token on chip, by which it is known what spills."""
    return int(sizes.get("WD", 0)) + int(sizes["WIDE"])


CASES = {
    "polynomial 2, causal, heads of 64": {
        "DEGREE": 2,
        "WD": 64,
        "WIDE": 64,
        "CAUSAL": True,
        "BACK": False,
    },
    "polynomial 2 of 16, values of 64": {
        "DEGREE": 2,
        "WD": 16,
        "WIDE": 64,
        "CAUSAL": False,
        "BACK": True,
    },
}
"""What ``structc bench triton`` compiles."""
_KINDS = {
    "places": "*i32",
    **dict.fromkeys(("z", "dots", "weights", "slopes", "f", "mass"), "*fp32"),
}


def words(dtype: torch.dtype) -> dict[str, str | bool]:
    """How products are made, for a job."""
    dot = "bf16" if dtype == torch.bfloat16 else "fp32"
    return {"DOT": dot, "TF32": dtype == torch.float16}


def arguments(kernel: str, word: str) -> dict[str, str]:
    """What a call passes, as Triton spells types."""
    kinds = {**_KINDS, "state": "*bf16" if word == "bf16" else "*fp32"}
    found = {name: kinds.get(name, f"*{word}") for name in POINTERS[kernel]}
    found |= {f"{t}{s}": "stride" for t in STRIDES[kernel] for s in "bhn"}
    return found | {n: "stride" if n in "de" else "i32" for n in LENGTHS[kernel]}


def entries(dtype: torch.dtype, targets: Sequence[str], every: bool) -> list[Entry]:
    """The kernels for each target, for ``structc bench triton``."""
    word, path, found = DTYPES[dtype], str(load.write(SOURCE)), []
    for name, case in CASES.items():
        for kernel in KERNELS:
            left_out = ("CAUSAL", "WD") if kernel == "states" else ("BACK",)
            sizes: dict[str, Any] = {k: v for k, v in case.items() if k not in left_out}
            sizes |= {"DECAY": False, **words(dtype)}
            for target in targets:
                key = f"polynomial_{kernel}"
                some = usable(key, width_of(sizes), CONFIGS, word, target)
                for at, config in enumerate(some[: None if every else 1]):
                    job = Job(
                        path, f"polynomial_{kernel}", arguments(kernel, word),
                        sizes | _tiles(kernel, config),
                        word, config.warps, config.stages, target,
                    )  # fmt: skip
                    known = f"{key} {width_of(sizes)}"
                    found.append(Entry(name, known, key, config, at == 0, job, None))
    return found
