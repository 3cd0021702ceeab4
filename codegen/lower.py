"""From a priced form to a kernel in the operator table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from structc import ops, reference
from structc.codegen import backward, dense, parts, spectral
from structc.codegen.cpu import tile
from structc.forms import Form, PackedDense, Tile
from structc.records import Refusal


def bind(
    form: Form,
    dtype: torch.dtype,
    rows: int,
    kernel: str,
    config: Mapping[str, int | str],
    *,
    transposed: bool = False,
) -> Refusal | None:
    """Build what a price names and attach it for calls of up to ``rows`` rows.

    Args:
        form: a tile program or a dense product.
        dtype: of the inputs that it will serve.
        rows: the bucket; the largest bucket serves all calls above it too.
        kernel: as in :attr:`structc.records.Price.kernel`, ``"tile[64]"`` or ``"onednn"``.
        config: as in :attr:`structc.records.Price.config`.
        transposed: dense only: the weight is stored (in_features, out_features).

    Returns:
        None once it is attached; a Refusal, and nothing attached, when it cannot be built. The
        reference runs then.
    """
    made = make(form, dtype, rows, kernel, config, transposed=transposed)
    if isinstance(made, Refusal):
        return made
    if isinstance(form, PackedDense):
        n, m, act = form.in_features, form.out_features, form.activation
        key = ops.dense_key(n, m, act, dtype, transposed)
    else:
        key = ops.tile_key(str(form), dtype)
        if kernel.startswith("tile"):
            backward.attach(form, dtype)
    ops.attach(key, rows, kernel, made)
    return None


def make(
    form: Form,
    dtype: torch.dtype,
    rows: int,
    kernel: str,
    config: Mapping[str, int | str],
    *,
    transposed: bool = False,
) -> ops.Kernel | Refusal:
    """The kernel that :func:`bind` attaches."""
    name = kernel.split("[", 1)[0]
    if isinstance(form, PackedDense):
        name = "aten" if name == "reference" else name
        return dense.make(form, dtype, rows, name, config, transposed=transposed)
    if name == "reference":
        return _reference(form)
    if name == "parts":
        return parts.make(form, config, lambda f, k, c: make(f, dtype, rows, k, c))
    if name in spectral.KERNELS:
        return spectral.make(form, dtype, name, config)
    if name != "tile":
        return Refusal("", name, "KERNEL", f"no kernel for tile programs is called {kernel!r}")
    return tile.make(form, config, dtype=dtype)


def _reference(form: Tile) -> ops.Kernel:
    program = str(form)

    def run(x: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Tensor:
        # A program of permutations alone may give a view, which an operator may not return.
        return reference.tile_reference(x, weights, program, others).contiguous()

    return run
