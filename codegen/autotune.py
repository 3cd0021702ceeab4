"""Stage 4, price: what each form costs on this machine, against the best dense kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from structc.codegen import cost
from structc.codegen.bench import Bench, Job
from structc.codegen.contenders import Contender, dense_contenders, tile_contenders
from structc.errors import ConfigError
from structc.forms import Form, PackedDense
from structc.records import Price, Refusal

EFFORTS = ("none", "quick", "full")
ROUNDS = {"quick": 7, "full": 15}


@dataclass(frozen=True)
class Request:
    """One form to price at one number of rows.

    Attributes:
        form: a tile program with its bias and activation steps, or a dense product.
        rows: of one call.
        dtype: of inputs and weights.
        bias: whether a bias is added (part of the program for a tile form).
        activation: at the end, or ``""`` (part of the form as well).
        transposed: dense only: the weight is stored (in_features, out_features).
    """

    form: Form
    rows: int
    dtype: torch.dtype
    bias: bool
    activation: str
    transposed: bool = False

    @property
    def in_features(self) -> int:
        return self.form.in_features

    @property
    def out_features(self) -> int:
        return self.form.out_features

    def dense(self) -> Request:
        """The dense product that this form has to beat."""
        if isinstance(self.form, PackedDense):
            return self
        form = PackedDense(self.in_features, self.out_features, self.activation)
        return Request(form, self.rows, self.dtype, self.bias, self.activation)

    def job(self, contender: Contender) -> Job:
        name = str(self.dtype).removeprefix("torch.")
        return Job(
            str(self.form),
            self.rows,
            name,
            self.bias,
            self.transposed,
            contender.kernel,
            contender.config,
        )


def price(
    requests: Sequence[Request],
    *,
    effort: str,
    seconds: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Request, Price | Refusal]:
    """Latency of every request against the best dense kernel at its shape."""
    if effort not in EFFORTS:
        raise ConfigError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    unique = list(dict.fromkeys(requests))
    if effort == "none":
        return {r: predict(r) for r in unique}
    bench, out, dense = Bench(), {}, {}
    for i, r in enumerate(unique):
        d = r.dense()
        if d not in dense:
            dense[d] = _price(d, None, bench, effort)
        out[r] = dense[d] if d == r else _price(r, dense[d], bench, effort)
        if progress is not None:
            progress(str(r.form), i + 1, len(unique))
    return out


def predict(request: Request) -> Price:
    """A price from the cost model: nothing is built, nothing is timed."""
    baseline = cost.predict_ms(request.dense().form, request.rows, request.dtype)
    latency = cost.predict_ms(request.form, request.rows, request.dtype)
    kernel = "aten" if isinstance(request.form, PackedDense) else "reference"
    return Price(
        str(request.form), request.rows, latency, baseline, kernel, {}, "aten", 0.0, "predicted"
    )


def _price(request, best, bench, effort):
    if best is None:
        cs = dense_contenders(request.form, request.rows, request.dtype, effort)
    else:
        cs = tile_contenders(request.form, request.rows, request.dtype, effort)
    ok, refused = [], []
    for c in cs:
        r = bench.check(request.job(c))
        (refused.append(r) if r else ok.append(c))
    if not ok:
        return (
            refused[0]
            if refused
            else Refusal("", "tile", "DTYPE", f"no kernel for {request.dtype}")
        )
    jobs = [request.job(c) for c in ok]
    if best is not None:
        jobs = [request.dense().job(Contender(best.kernel.split("[")[0], best.config)), *jobs]
    timed = bench.time(jobs, ROUNDS[effort])
    base = timed[0]
    mine = list(zip(ok, timed[1:] if best is not None else timed))
    c, t = min(mine, key=lambda p: p[1].latency_ms)
    label = f"tile[{c.config['layout']},{c.config['tile']}]" if c.kernel == "tile" else c.kernel
    return Price(
        str(request.form),
        request.rows,
        t.latency_ms,
        base.latency_ms,
        label,
        dict(c.config),
        best.kernel if best else "aten",
        t.spread,
        "measured",
    )
