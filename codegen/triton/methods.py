"""Which attention methods have kernels of their own, and what the others run on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from structc.codegen.triton import conv_basis, load, monarch, polynomial, sparse_polynomial
from structc.codegen.triton.device import running
from structc.records import Refusal

_POLYNOMIAL = polynomial.PolynomialKernel()
KERNELS: Mapping[str, Callable[..., Any]] = {
    "conv_basis": conv_basis.apply,
    "monarch": monarch.apply,
    "polynomial": _POLYNOMIAL,
    "toeplitz_polynomial": _POLYNOMIAL,
    "sparse_low_rank": sparse_polynomial.apply,
}
"""By name of the method; each takes what its plain form takes, and gives None where that is
better."""
OTHERS: Mapping[str, str] = {
    "uniform": "running sums of PyTorch: no product to save",
    "window_sinks": "structc::attention with a window",
    "row_column_toeplitz": "FFTs of the vendor's library, in float64 where rows are faint",
    "block_sparse": "structc::attention with a list of blocks",
    "tiled_monarch": "the kernel of monarch attention, its tokens in another order",
    "nystrom": "products of PyTorch with a few landmarks, and a small inverse",
}
"""What a method without a kernel of its own runs on, on a GPU."""
_log = logging.getLogger("structc")


def kernel_of(name: str) -> Callable[..., Any] | None:
    """The kernel of a method on this process's GPU, or None: its plain form runs."""
    if name not in KERNELS or load.version() is None:
        return None
    target = running()
    if isinstance(target, Refusal):
        _log.info("%s runs in its plain form: %s", name, target.reason)
        return None
    load.warn_untested()
    return KERNELS[name]
