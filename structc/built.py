"""One matrix, tuned for this machine: ``structc.build``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from structc import ops
from structc.boundary import public_boundary
from structc.codegen import autotune, lower
from structc.codegen.autotune import Request
from structc.errors import ConfigError
from structc.families import AbstractFamily, Dense
from structc.families.base import with_epilogue
from structc.forms import (
    ACTIVATIONS,
    Bias,
    Block,
    Convolve,
    Displace,
    Form,
    Norm,
    PackedDense,
    Repeat,
    Shared,
    Tile,
    parse_form,
)
from structc.options import effort_of
from structc.progress import named, progress_bars
from structc.records import Price, Refusal


class Built(nn.Module):
    """A tuned map ``x (..., in_features) -> (..., out_features)``.

    Attributes:
        family: the factors, with the bias; None if only a form was given.
        form: what computes them, activation included.
        prices: for each number of rows, what the chosen kernel takes and what dense takes.
        refusals: why a kernel that was asked for is not there; the reference runs instead.
    """

    def __init__(
        self,
        family: AbstractFamily | None,
        form: Form,
        prices: Mapping[int, Price],
        refusals: Sequence[Refusal],
        bias: Tensor | None,
        activation: str,
    ) -> None:
        super().__init__()
        self.family, self.form, self.activation = family, form, activation
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.prices, self.refusals = dict(prices), tuple(refusals)
        self._program = str(form)
        many = form.weights - (bias is not None) if isinstance(form, Tile) else 1
        self._shapes = _shapes(form)[:many]
        dense = isinstance(form, PackedDense)
        self._dense_rows = frozenset(r for r, p in prices.items() if _is_dense(p) and not dense)

    def forward(self, x: Tensor, weights: Sequence[Tensor] = ()) -> Tensor:
        """The map; a form without a family takes its weights here, in the order of its steps."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise ConfigError(f"{self._program} takes a tensor (..., features), got {_kind(x)}")
        family, bias = self.family, self.bias
        if family is not None and self._bucket(x) in self._dense_rows and not _graded(self, x):
            weight = ops.derived(family.factors(), "dense", lambda _: _multiplied_out(family))
            return ops.dense(x, weight, family.bias, self.activation, False)
        if family is not None:
            weights, bias = family.factors(), family.bias
        else:
            self._check(weights)
        if isinstance(self.form, PackedDense):
            (weight,) = weights
            transposed = isinstance(family, Dense) and family.transposed
            return ops.dense(x, weight, bias, self.form.activation, transposed)
        listed = list(weights) if bias is None else [*weights, bias]
        y: Tensor = ops.tile([x], listed, self._program)[0]
        return y

    def _check(self, weights: Sequence[Tensor]) -> None:
        """Weights that came with a call are the user's: kernels read what the form says."""
        wanted = self._shapes
        if not isinstance(weights, (list, tuple)) or len(weights) != len(wanted):
            listed = isinstance(weights, (list, tuple))
            got = str(len(weights)) if listed else type(weights).__name__
            raise ConfigError(
                f"{self._program} takes a list of {len(wanted)} weights at each call, got {got}",
                hint="In the order of its steps; build() of fitted factors keeps them itself.",
            )
        for at, (weight, shapes) in enumerate(zip(weights, wanted, strict=True)):
            if not isinstance(weight, Tensor):
                raise ConfigError(f"{self._program}: weight {at} is a {type(weight).__name__}")
            if shapes and weight.shape not in shapes:
                raise ConfigError(
                    f"{self._program} takes a weight {at} of {shapes[0]}, got {tuple(weight.shape)}"
                )

    def _bucket(self, x: Tensor) -> int:
        rows = x.numel() // max(1, x.shape[-1])
        return min((r for r in self.prices if r >= rows), default=max(self.prices, default=0))

    def extra_repr(self) -> str:
        lines = [str(self.form)]
        for rows, p in sorted(self.prices.items()):
            how = p.source if p.source != "measured" else f"measured, spread {p.spread:.0%}"
            lines.append(
                f"{rows} rows: {p.kernel} {p.latency_ms:.3g} ms, {p.speedup:.2f}x over "
                f"{p.baseline or 'dense'} ({how})"
            )
        return "\n".join([*lines, *(f"refused: {r.reason}" for r in self.refusals)])


def build(
    family_or_form: AbstractFamily | Form | str,
    *,
    rows: int | Sequence[int],
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    effort: str | float = "quick",
    progress: Callable[[str, int, int], None] | None = None,
) -> Built:
    """A tuned callable for one matrix; of fitted factors never slower than the best dense product.

    Where fitted factors lose at some number of rows, the dense matrix runs there instead (unless a
    gradient is wanted: the factors train). A form takes its weights at each call: it always runs,
    and the speedup that the result prints tells whether it should. Other numbers of rows run by the
    nearest one above, else by the largest.

    Args:
        family_or_form: fitted factors, or a form (or its text) that takes its weights at each call.
        rows: of one call, or several: each is tuned.
        dtype: of inputs and weights; by default that of the factors, float32 for a form.
        bias: (out_features,), added; kept, and trained, with the factors.
        activation: applied at the end: gelu, gelu_tanh, relu or silu.
        effort: as in :func:`structc.compile`.
        progress: called with a name, how many are done, and how many there are; without it a
            terminal shows a bar.

    Errors: :class:`ConfigError` for arguments that do not fit each other.

    >>> from structc.families import LowRank
    >>> op = build(LowRank.fit(torch.randn(96, 64), rank=20), rows=(1, 32), effort="none")
    >>> op(torch.randn(2, 3, 64)).shape
    torch.Size([2, 3, 96])
    """
    with public_boundary():
        buckets = _rows(rows)
        act = _activation(activation)
        _check_tensors(dtype, bias)
        family, form, dtype = _parts(family_or_form, dtype, bias, act)
        own = None if bias is None else bias.to(dtype)
        has_bias = bias is not None if family is None else family.bias is not None
        transposed = isinstance(family, Dense) and family.transposed
        wanted = {
            r: Request(form, r, dtype, has_bias, act, transposed and isinstance(form, PackedDense))
            for r in buckets
        }
        rivals = {r: w.dense() for r, w in wanted.items()}
        requests = [*wanted.values(), *rivals.values()]
        name, seconds = effort_of(effort)
        with progress_bars(wanted=progress is None, first="tune") as bars:
            shown = named(bars, "tune") if progress is None else progress
            found = autotune.price(requests, effort=name, seconds=seconds, progress=shown)
        prices: dict[int, Price] = {}
        refusals: list[Refusal] = []
        for r in buckets:
            ours, dense = found[wanted[r]], found[rivals[r]]
            chosen = _chosen(ours, dense, family, name, refusals)
            if chosen is not None:
                prices[r] = chosen
                refusals += _bound(chosen, wanted[r] if chosen is ours else rivals[r], r)
        return Built(family, form, prices, refusals, None if family is not None else own, act)


def _rows(rows: int | Sequence[int]) -> tuple[int, ...]:
    several = isinstance(rows, Sequence) and not isinstance(rows, str)
    found: tuple[Any, ...] = tuple(cast(Any, rows)) if several else (rows,)
    if not found or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in found):
        raise ConfigError(
            f"build: rows must be a positive int or several, got {rows!r}",
            hint="rows is how many vectors one call multiplies: batch times length.",
        )
    return tuple(sorted(set(found)))


def _check_tensors(dtype: object, bias: object) -> None:
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if dtype is not None and not floating:
        raise ConfigError(f"build: dtype must be a floating torch.dtype, got {dtype!r}")
    if bias is not None and not isinstance(bias, Tensor):
        raise ConfigError(f"build: bias must be a tensor, got {type(bias).__name__}")


def _activation(activation: str | None) -> str:
    act = activation or ""
    if act and act not in ACTIVATIONS:
        raise ConfigError(
            f"build: activation {activation!r} is none of {', '.join(ACTIVATIONS)}",
            hint="Leave it out and apply another function to the result.",
        )
    return act


def _parts(
    given: AbstractFamily | Form | str, dtype: torch.dtype | None, bias: Tensor | None, act: str
) -> tuple[AbstractFamily | None, Form, torch.dtype]:
    """The family with its bias in the dtype wanted, the whole form, the dtype."""
    if isinstance(given, Refusal):
        raise ConfigError(
            f"build: the fit was refused: {given.reason}", hint="Try other hyper-parameters."
        )
    if isinstance(given, AbstractFamily):
        held = [t.dtype for t in (*given.parameters(), *given.buffers()) if t.dtype != torch.int64]
        dtype = dtype or (held[0] if held else torch.float32)
        family = copy.deepcopy(given).to(dtype)
        _check_bias(bias, family.out_features)
        if bias is not None and family.bias is not None:
            raise ConfigError(
                "build: the family has a bias already", hint="Give one of the two, or their sum."
            )
        if bias is not None:
            family.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
        return family, family.form(act), dtype
    try:
        form = parse_form(given) if isinstance(given, str) else given
    except Exception as e:
        raise ConfigError(
            f"build: {e}",
            hint="Steps have no spaces inside and single ones between (docs/kernels.md).",
        ) from None
    if not isinstance(form, (Tile, PackedDense)):
        raise ConfigError(
            f"build: expected a family, a form or its text, got {type(given).__name__}",
            hint="structc.families.LowRank.fit(weight, rank=...) gives a family; what a weight is "
            "exactly, structc.recognize(weight).family.",
        )
    _check_form(form)
    _check_bias(bias, form.out_features)
    if isinstance(form, Tile):
        form = with_epilogue(form, bias=bias is not None, activation=act)
    else:
        form = dataclasses.replace(form, activation=act or form.activation)
    return None, form, dtype or torch.float32


def _check_form(form: Form) -> None:
    if min(form.in_features, form.out_features) < 1:
        raise ConfigError(f"build: {form} has no features")
    if isinstance(form, Tile) and len(form.input_features) > 1:
        raise ConfigError(
            f"build: {form} reads {len(form.input_features)} inputs, a call has one",
            hint="Slot 0 is the input; keep(n,slot) fills another one.",
        )


def _check_bias(bias: Tensor | None, out_features: int) -> None:
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ConfigError(
            f"build: bias has shape {tuple(bias.shape)}, expected ({out_features},)",
            hint="A bias is one number for each output feature.",
        )


def _chosen(
    ours: Price | Refusal,
    dense: Price | Refusal,
    family: AbstractFamily | None,
    effort: str,
    refusals: list[Refusal],
) -> Price | None:
    """The faster of both; dense needs a family, whose matrix is known."""
    if isinstance(ours, Refusal):
        refusals.append(ours)
        return dense if family is not None and isinstance(dense, Price) else None
    refusals += filter(None, [ours.without])
    slower = effort != "none" and ours.latency_ms > ours.baseline_ms
    return dense if slower and family is not None and isinstance(dense, Price) else ours


def _bound(price: Price, request: Request, rows: int) -> list[Refusal]:
    refusal = lower.bind(
        request.form,
        request.dtype,
        rows,
        price.kernel,
        price.config,
        transposed=request.transposed,
    )
    return [] if refusal is None else [refusal]


def _shapes(form: Form) -> list[tuple[tuple[int, ...], ...]]:
    """For each weight of a form the shapes that it may have; none where any will do."""
    if isinstance(form, PackedDense):
        return [((form.out_features, form.in_features),)]
    found: list[tuple[tuple[int, ...], ...]] = []
    for step in form.steps:
        match step:
            case Block(1, b, c, 1):
                found.append(((1, b, c, 1), (b, c)))
            case Block(a, b, c, d):
                found.append(((a, b, c, d), (a, b, c)) if d == 1 else ((a, b, c, d),))
            case Repeat(_, b, c, d):
                found.append(((b, c, d),))
            case Shared(_, b, c, _):
                found.append(((b, c),))
            case Convolve():
                found.append(((step.taps,),))
            case Displace(n, r):
                found += [((r, n),)] * 2
            case Bias(n) | Norm(n):
                found += [((n,),)] * step.weights
            case _:
                found += [()] * step.weights
    return found


def _kind(x: object) -> str:
    return "one without dimensions" if isinstance(x, Tensor) else type(x).__name__


def _is_dense(price: Price) -> bool:
    return price.form.startswith("dense(")


def _multiplied_out(family: AbstractFamily) -> Tensor:
    return family.to_dense().detach().contiguous()


def _graded(module: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in module.parameters())
    )
