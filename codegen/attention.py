"""Attention on emitted kernels: one library a dtype, generic in sizes and masks."""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from structc import attend, hardware
from structc.codegen.cpu import build
from structc.codegen.cpu.emit import product_pieces
from structc.codegen.cpu.served import DTYPES
from structc.codegen.cpu.tile import TOLERANCE
from structc.numerics import relative_error
from structc.records import Refusal
from structc.softmax import NOTHING, Extras, Softmax, softmax_reference

FEW = 4
"""Queries that keys and values are not packed for (``attention_few.h``)."""
PANEL, EXTRA = 64, 4
"""Keys packed together, and words beside them (``attention.h``)."""
TILE, BLOCK_TILES = 48, (64, 48, 96, 80, 32)
"""Queries of a tile; of one that must lie within a block of queries, the best first."""
FITS = 1 << 17
"""Words of one head that a thread may pack for itself: half an L2."""
_OWN = 3
_BIAS = {torch.float32: 1, torch.bool: 2, torch.bfloat16: _OWN}
"""How the kernel reads a bias; one in bfloat16 only beside q in bfloat16."""
_INCLUDED = (
    "atomic",
    "cmath",
    "cstdint",
    "cstdlib",
    "cstring",
    "initializer_list",
    "new",
    "pthread.h",
)
_log = logging.getLogger("structc")


def kernel_of(dtype: torch.dtype) -> attend.Kernel | None:
    """The kernel of a dtype, built and tested against the reference; None where there is none."""
    made = make(dtype)
    if isinstance(made, Refusal):
        _log.info("attention in %s runs on the reference: %s", dtype, made.reason)
        return None
    return made


def make(dtype: torch.dtype) -> AttentionKernel | Refusal:
    """Build, or find built, the kernel of a dtype."""
    if dtype not in DTYPES:
        return _refuse("DTYPE", f"emitted kernels are float32 or bfloat16, not {dtype}")
    if dtype == torch.bfloat16 and "avx512_bf16" not in hardware.target().isa:
        return _refuse("ISA", "bfloat16 kernels need AVX-512 BF16")
    library = build.load(f"attention_{DTYPES[dtype]}", emit(dtype))
    if isinstance(library, Refusal):
        return library
    function = library.structc_run
    function.argtypes, function.restype = [ctypes.c_void_p] * 3, ctypes.c_int32
    kernel = AttentionKernel(dtype, function)
    return build.tested(library, lambda: _self_test(kernel)) or kernel


def emit(dtype: torch.dtype) -> str:
    """The C++ source of the library of a dtype."""
    included = "".join(f"#include <{name}>\n" for name in _INCLUDED)
    names = list(dict.fromkeys([*product_pieces(dtype)[:1], "words", *product_pieces(dtype)[1:]]))
    names += [f"attention_{DTYPES[dtype]}", "attention", "attention_few"]
    folder = resources.files("structc.codegen.cpu")
    parts = [folder.joinpath(f"{name}.h").read_text() for name in names]
    return "\n".join([f"// structc attention kernel {DTYPES[dtype]}", included, *parts])


@dataclass(frozen=True, eq=False)
class AttentionKernel:
    """``(q, k, v, form, extras) -> (o, lse)``; None for inputs that it does not serve."""

    dtype: torch.dtype
    function: Callable[..., int]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, form: Softmax, extras: Extras
    ) -> tuple[Tensor, Tensor] | None:
        o, lse = attend.empty_outputs(q, v)
        return (o, lse) if self.into(q, k, v, form, extras, o, lse) else None

    def into(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        form: Softmax,
        extras: Extras,
        o: Tensor,
        lse: Tensor,
    ) -> bool:
        """Write output and row sums, all of them; False, and nothing, if these are not served."""
        if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
            q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        b, h, n, d = q.shape
        _, g, m, dv = v.shape
        threads = torch.get_num_threads()
        packed: Tensor | None = None
        tile = TILE
        if n > FEW:
            packed, tile = _layout(self.dtype, (b, g, m, d, dv), threads, form)
        sizes = [b, h, h // g, n, m, d, dv, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
        sizes += o.stride()[:3]
        sizes += (form.causal, form.offset, form.window, form.sinks, threads, tile)
        if extras is NOTHING or extras == NOTHING:
            sizes += _PLAIN
            rest: tuple[Tensor | None, ...] = NOTHING
        else:
            kind = 0 if extras.bias is None else _BIAS.get(extras.bias.dtype)
            if kind is None or (kind == _OWN and self.dtype != torch.bfloat16):
                return False
            rest = _contiguous(extras)
            sizes += _given(Extras(*rest), form)
        pointers = [t.data_ptr() for t in (q, k, v, o, lse)]
        pointers += [0 if t is None else t.data_ptr() for t in (*rest, packed)]
        failed = self.function(
            _SIZES.pack(*sizes), _POINTERS.pack(*pointers), _REALS.pack(form.scale, form.softcap)
        )
        if failed:
            raise RuntimeError(f"emitted attention kernel failed ({failed})")
        return True


_COUNT = 38
_SIZES, _POINTERS, _REALS = struct.Struct(f"{_COUNT}q"), struct.Struct("11P"), struct.Struct("2f")
"""Bytes are made in a quarter of the time that an array of ctypes takes."""
_PLAIN = (0,) * 13
"""What is said of extras where there are none."""


def _contiguous(extras: Extras) -> tuple[Tensor | None, ...]:
    """The tensors as the kernel reads them."""
    bias, lags, keys, blocks, sink = extras
    lags, sink = (None if t is None else t.float() for t in (lags, sink))
    lags, keys, sink = (None if t is None else t.contiguous() for t in (lags, keys, sink))
    return bias, lags, keys, blocks, sink


def _given(extras: Extras, form: Softmax) -> list[int]:
    """What the kernel is told of extras: strides, those of dimensions that repeat are 0."""
    bias, lags, keys, blocks, _ = extras
    sizes = [0] * 5 if bias is None else [_BIAS[bias.dtype], *(_stride(bias, i) for i in range(4))]
    sizes += [0 if lags is None else _stride(lags, 0), 0 if keys is None else _stride(keys, 0)]
    sizes += [0] * 4 if blocks is None else [_stride(blocks, i) for i in range(4)]
    return [*sizes, form.block_q, form.block_k]


def _stride(t: Tensor, at: int) -> int:
    return 0 if t.shape[at] == 1 else t.stride(at)


def _layout(
    dtype: torch.dtype, sizes: tuple[int, ...], threads: int, form: Softmax
) -> tuple[Tensor | None, int]:
    """Where heads are packed (None: each thread packs its own), and queries of a tile."""
    b, g, m, d, dv = sizes
    per_word = 4 // dtype.itemsize
    panels = -(-m // PANEL)
    wide = -(-dv // 16) * 16
    words = panels * (-(-d // per_word) * PANEL + PANEL // per_word * wide + EXTRA)
    tile = next((t for t in BLOCK_TILES if form.block_q and form.block_q % t == 0), TILE)
    alone = words <= FITS and b * g >= 2 * threads
    return None if alone else torch.empty(b * g * words, dtype=torch.int32), tile


def _self_test(kernel: AttentionKernel) -> Refusal | None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 150, 20, generator=generator)
    k, v = torch.randn(2, 2, 2, 170, 20, generator=generator).unbind(0)
    q, k, v = (t.to(kernel.dtype) for t in (q, k, v))
    keys = torch.arange(170)[None] < torch.tensor([[170], [100]])
    bias = torch.randn(1, 1, 150, 170, generator=generator)
    for form, extras in (
        (Softmax(0.3), Extras(keys=keys)),
        (Softmax(0.3, causal=True, offset=20, window=40, sinks=3), Extras()),
        (Softmax(0.3, softcap=4.0), Extras(bias=bias)),
    ):
        o, lse = q.new_full(q.shape, torch.nan), torch.full(q.shape[:3], torch.nan)
        try:
            kernel.into(q, k, v, form, extras, o, lse)
        except RuntimeError as e:
            return _refuse("SELF_TEST", str(e))
        want = softmax_reference(q.double(), k.double(), v.double(), form, extras)
        for got, right in zip((o, lse), want, strict=True):
            error = relative_error(got, right)
            if not error <= TOLERANCE[kernel.dtype]:
                return _refuse("SELF_TEST", f"{form}: error {error:.1e} against the reference")
    return None


def _refuse(code: str, reason: str) -> Refusal:
    return Refusal("", "attention", code, reason)
