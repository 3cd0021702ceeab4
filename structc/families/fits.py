"""What stands around the mathematics of every fit: checks before it, casts and measures after it.

A family writes the mathematics alone, in float64, for a weight that is a finite matrix; the
decorator :func:`analytic` makes it keep the laws that the contract suite checks.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from structc.errors import ConfigError
from structc.families.base import AbstractFamily
from structc.numerics import ROWS, weighted_error
from structc.records import Refusal

Fit = TypeVar("Fit", bound=Callable[..., Any])

LARGEST, SMALLEST = 1e100, 1e-100
"""Beyond these the squares of weights leave the range of float64."""
SLACK = 2e-2
"""Of the largest diagonal entry: what sums in bfloat16 may do to a Gram matrix."""
SAMPLES = 8
SIDE = 128
"""Gaussian spectra are sampled at matrices of this short side: larger ones have the same shape."""


def analytic(fit: Fit) -> Fit:
    """Make the function under a family's ``fit`` keep the laws of all fits.

    The function sees a finite weight in float64 and a symmetric Gram matrix of mean diagonal 1, or
    None; it returns a module in float64, or a refusal. What comes out has the weight's dtype and
    carries ``fit_error``; factors that the dtype cannot hold, and decompositions that do not
    converge, are refusals.

    Errors: :class:`ConfigError` for arguments of wrong types, never for the values of a weight.
    """
    kinds = {
        name: str(p.annotation)
        for name, p in inspect.signature(fit).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }

    @functools.wraps(fit)
    def checked(cls: Any, weight: Any, gram: Any = None, **hyper: Any) -> Any:
        where = f"{cls.__name__}.fit"
        check_tensors(where, weight, gram)
        hyper = {key: _plain(where, key, kinds.get(key, ""), v) for key, v in hyper.items()}
        if refusal := refuse_weight(cls.name, weight, gram):
            return refusal
        with torch.no_grad():
            try:
                metric = _scaled(gram)
                made = fit(cls, weight.detach().double().contiguous(), metric, **hyper)
            except torch.linalg.LinAlgError as e:
                reason = f"a decomposition does not converge: {e}"
                return Refusal("", cls.name, "NUMERICS", reason)
            return (
                made
                if isinstance(made, Refusal)
                else _stored(made, weight, gram if metric is None else metric)
            )

    return cast(Fit, checked)


def check_tensors(where: str, weight: Any, gram: Any) -> None:
    """Raise a :class:`ConfigError` for a weight or a Gram matrix that is no tensor."""
    for name, value in (("weight", weight), ("gram", gram)):
        if not isinstance(value, Tensor) and not (name == "gram" and value is None):
            raise ConfigError(
                f"{where}: {name}: expected a torch.Tensor, got {type(value).__name__}",
                hint=f"Convert it: torch.as_tensor({name}).",
            )


def _plain(where: str, name: str, kind: str, value: Any) -> Any:
    """A hyper-parameter as a plain number or word."""
    if kind == "str":
        right = isinstance(value, str)
    else:
        right = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not right:
        wanted = "a word" if kind == "str" else "a whole number"
        raise ConfigError(
            f"{where}: {name}: expected {wanted}, got {value!r} ({type(value).__name__})",
            hint="Shares of parameters are no ranks: proposals() lists what fits a size.",
        )
    return value if kind == "str" else int(value)


def refuse_weight(family: str, weight: Tensor, gram: Tensor | None) -> Refusal | None:
    """The refusals that every fit shares: no matrix, no elements, wrong dtype, bad values."""

    def refuse(code: str, reason: str) -> Refusal:
        return Refusal(site="", family=family, code=code, reason=reason)

    if weight.dim() != 2:
        return refuse("NOT_A_MATRIX", f"the weight has {weight.dim()} dimensions, 2 are needed")
    if weight.numel() == 0:
        return refuse("EMPTY", f"the weight is {tuple(weight.shape)}: nothing to compute")
    if not weight.is_floating_point() or weight.element_size() < 2:
        return refuse("DTYPE", f"weights of {weight.dtype} are not fitted")
    if weight.is_meta or weight.layout is not torch.strided:
        return refuse("LAYOUT", f"a weight on {weight.device}, {weight.layout}, is not fitted")
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        where = tuple((~finite).nonzero()[0].tolist())
        bad = int((~finite).sum())
        return refuse("NONFINITE", f"{bad} weights are NaN or infinite, the first at {where}")
    largest = float(torch.linalg.vector_norm(weight.detach(), math.inf))
    if largest > LARGEST or 0 < largest < SMALLEST:
        return refuse(
            "RANGE", f"weights of size {largest:.1e}: their squares leave float64's range"
        )
    return None if gram is None else _refuse_gram(family, gram, weight.shape[1])


def _refuse_gram(family: str, gram: Tensor, n: int) -> Refusal | None:
    def refuse(code: str, reason: str) -> Refusal:
        return Refusal(site="", family=family, code=code, reason=reason)

    if tuple(gram.shape) != (n, n):
        return refuse("GRAM_SHAPE", f"Gram is {tuple(gram.shape)}, the weight wants {(n, n)}")
    if not gram.is_floating_point():
        return refuse("GRAM_DTYPE", f"a Gram matrix of {gram.dtype} is not E[x x^T] of real inputs")
    if not bool(torch.isfinite(gram).all()):
        return refuse("GRAM_NONFINITE", "the calibration Gram matrix is not finite")
    if n and (reason := _no_gram(gram.detach().double(), torch.finfo(gram.dtype).eps)):
        return refuse("NOT_A_GRAM", f"this is no E[x x^T]: {reason}")
    return None


def _no_gram(c: Tensor, eps: float) -> str:
    """What tells at a look that a matrix is no Gram matrix, or nothing."""
    diagonal = c.diagonal()
    largest = float(diagonal.abs().max())
    if largest > LARGEST**3:
        return f"entries of {largest:.1e} leave float64's range"
    level = max(SLACK, 8 * eps) * largest
    if float(diagonal.min()) < -level:
        return f"its diagonal goes down to {float(diagonal.min()):.2g}"
    root = diagonal.clamp_min(0).sqrt()
    for first in range(0, len(c), ROWS):
        now = slice(first, first + ROWS)
        if float((c[now] - c[:, now].mT).abs_().max()) > level:
            return "it is not symmetric"
        if float(c[now].abs().sub_(root[now, None] * root).max()) > level:
            return "an entry is larger than the two of the diagonal allow"
    return ""


def _scaled(gram: Tensor | None) -> Tensor | None:
    """The Gram in float64, symmetric, with a mean diagonal near 1; None if it says nothing."""
    if gram is None:
        return None
    level = float(gram.diagonal().double().mean())
    if level < SMALLEST**3:
        return None  # inputs that are zero say nothing of a fit
    c = gram.detach().double() * 2.0 ** -math.frexp(level)[1]  # a power of two: nothing is rounded
    for first in range(0, len(c), ROWS):  # no second matrix of this size
        now = slice(first, first + ROWS)
        even = (c[now, first:] + c[first:, now].mT).mul_(0.5)
        c[now, first:], c[first:, now] = even, even.mT
    return c if gram.dtype == torch.float64 else _without_rounding(c)


def _without_rounding(c: Tensor) -> Tensor:
    """A Gram of narrow numbers without what their rounding left in directions of no data.

    Its negative eigenvalues say how large that is; positive ones of this size are the same.
    """
    values, vectors = torch.linalg.eigh(c)
    noise = float(-values[0])
    if noise <= 0:
        return c
    return (vectors * torch.where(values > 2 * noise, values, 0.0)) @ vectors.mT


def _stored(made: AbstractFamily, weight: Tensor, gram: Tensor | None) -> AbstractFamily | Refusal:
    """The module in the weight's dtype, owning its memory, with the error of what is stored."""
    theirs = weight.untyped_storage().data_ptr()
    stored = []
    for name, parameter in made.named_parameters():
        value = parameter.data.to(weight.dtype).contiguous()
        if value.untyped_storage().data_ptr() == theirs:
            value = value.clone()
        if not bool(torch.isfinite(value).all()):
            if not bool(torch.isfinite(parameter.data).all()):
                return Refusal("", made.name, "NUMERICS", f"the fit of factor {name} is not finite")
            largest = float(parameter.data.abs().max())
            reason = f"factor {name} goes up to {largest:.1e}, {weight.dtype} cannot hold that"
            return Refusal("", made.name, "OVERFLOW", reason)
        stored.append((parameter, value))
        parameter.data = value.double()
    made.fit_error = weighted_error(weight, made.to_dense(), gram)
    for parameter, value in stored:
        parameter.data = value
    return made.to(weight.dtype)  # buffers too


def refuse_rank(family: str, rank: int, most: int) -> Refusal | None:
    """The refusal of a rank outside 1..most."""
    if 1 <= rank <= most:
        return None
    return Refusal("", family, "RANK", f"rank {rank} is not in 1..{most}")


def refuse_grid(family: str, weight: Tensor, in_blocks: int, out_blocks: int) -> Refusal | None:
    """The refusal of a grid of blocks that does not divide a weight."""
    m, n = weight.shape
    if in_blocks >= 1 and out_blocks >= 1 and not n % in_blocks and not m % out_blocks:
        return None
    grid = f"a {in_blocks} x {out_blocks} grid of blocks"
    return Refusal("", family, "GRID", f"{grid} does not divide {n} inputs, {m} outputs")


# ---------------------------------------------------------------------------- the null


def gaussian_tail(m: int, n: int, rank: int) -> float:
    """Relative error of the best approximation of rank r to an (m, n) Gaussian matrix.

    Large matrices have the spectrum of smaller ones (Marchenko-Pastur), so it is sampled at a
    short side of 128 at most, averaged where that is little, interpolated between whole ranks.

    >>> round(gaussian_tail(128, 128, 32), 2)
    0.61
    """
    short, long = sorted((m, n))
    if rank >= short:
        return 0.0
    scale = max(1.0, short / SIDE)
    rows = round(short / scale)
    kept = _kept(rows, min(round(long / scale), 64 * SIDE))  # flat beyond
    low, part = divmod(rank * rows / short, 1)
    share = float(kept[int(low)] + part * (kept[min(int(low) + 1, rows)] - kept[int(low)]))
    return math.sqrt(max(0.0, 1.0 - share))


@functools.lru_cache(maxsize=256)
def _kept(rows: int, columns: int) -> Tensor:
    """Share of a Gaussian matrix's energy that its leading 0, 1, 2 ... directions keep."""
    samples = max(1, 2 * SIDE // rows)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(samples, rows, columns, generator=g, dtype=torch.float64)
    energy = torch.linalg.eigvalsh(x @ x.mT).flip(-1).mean(0)
    return torch.cat([energy.new_zeros(1), energy.cumsum(0)]) / energy.sum()


def simulated(family: type[AbstractFamily], n: int, m: int, hyper: Mapping[str, Any]) -> float:
    """The error of a family's own fit to a Gaussian matrix (m, n), averaged where it is small."""
    g = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(max(1, 4 * SIDE**2 // (n * m))):
        weight = torch.randn(m, n, generator=g, dtype=torch.float64)
        made = family.fit(weight, **hyper)  # type: ignore[attr-defined]
        if isinstance(made, Refusal):
            return math.nan
        errors.append(float(made.fit_error))
        if len(errors) == SAMPLES:
            break
    return math.fsum(errors) / len(errors)
