"""The laws of a structure family. A line in ``FAMILIES`` is the act of joining this suite.

The dense form that everything is held against is built here, from the factors and the program, as a
product of explicit matrices: it shares no code with ``forward`` or ``to_dense``.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy import fft, linalg
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from structc import reference
from structc.errors import ConfigError
from structc.families import (
    BY_NAME,
    FAMILIES,
    AbstractFamily,
    AbstractStructured,
    Dense,
    learned_butterfly,
)
from structc.forms import (
    ACTIVATIONS,
    COMPLEX,
    SPECTRAL,
    TRANSFORMS,
    Act,
    Add,
    Bias,
    Block,
    Convolve,
    Displace,
    Flip,
    Keep,
    Load,
    PackedDense,
    Permute,
    Repeat,
    Select,
    Shared,
    Sparse,
    Tile,
    Transform,
)
from structc.numerics import relative_error, weighted_error
from structc.records import Refusal

SHAPES = {  # in_features, out_features
    "square": (24, 24),
    "power": (16, 16),
    "tall": (24, 40),
    "wide": (40, 24),
    "odd": (15, 21),
    "prime": (13, 17),
    "one-in": (1, 16),
    "one-out": (16, 1),
    "one-one": (1, 1),
}
Hyper = Mapping[str, Any]
"""Numbers and words."""
MORE: dict[str, list[Hyper]] = {
    "low_rank": [{"rank": 1}, {"rank": 5}],
    "monarch": [
        {"in_blocks": 3, "out_blocks": 3, "rank": 2},
        {"in_blocks": 5, "out_blocks": 3, "rank": 3},
        {"in_blocks": 8, "out_blocks": 4, "rank": 2},
        {"in_blocks": 1, "out_blocks": 1, "rank": 1},
    ],
    "blast": [
        {"blocks": 1, "rank": 1},
        {"blocks": 3, "rank": 4},
        {"blocks": 4, "rank": 7},
        {"blocks": 8, "rank": 2},
    ],
    "block_diagonal": [
        {"blocks": g, "order": order} for g in (1, 3, 8) for order in ("given", "clustered")
    ],
    "block_sparse": [
        {"height": 8, "width": 6, "count": 7},
        {"height": 7, "width": 5, "count": 1},
        {"height": 1, "width": 8, "count": 3},
        {"height": 4, "width": 8, "count": 4},
    ],
    "pixelfly": [
        {"blocks": 8, "levels": 2, "rank": 3},
        {"blocks": 4, "levels": 1, "rank": 1},
        {"blocks": 2, "levels": 1, "rank": 1},
    ],
    "butterfly": [
        {"levels": 4, "rank": 1},
        {"levels": 3, "rank": 2},
        {"levels": 2, "rank": 3},
        {"levels": 1, "rank": 1},
    ],
    "kronecker": [
        {"in_outer": 3, "out_outer": 3, "terms": 2},
        {"in_outer": 8, "out_outer": 4, "terms": 1},
        {"in_outer": 5, "out_outer": 3, "terms": 3},
        {"in_outer": 1, "out_outer": 1, "terms": 1},
    ],
    "ragged_monarch": [
        {"in_blocks": 3, "out_blocks": 3, "width": 2, "groups": 7},
        {"in_blocks": 2, "out_blocks": 4, "width": 1, "groups": 9},
        {"in_blocks": 1, "out_blocks": 1, "width": 1, "groups": 1},
    ],
    "learned_butterfly": [
        {"layout": "bp", "depth": 1, "tied": 0},
        {"layout": "bp", "depth": 2, "tied": 1},
        {"layout": "kaleidoscope", "depth": 1, "tied": 0},
        {"layout": "kaleidoscope", "depth": 1, "tied": 1},
    ],
    "circulant": [{}],
    "toeplitz": [{}],
    "hankel": [{}],
    "diagonal": [{}],
    "selection": [{}],
    "displacement": [{"rank": 1}, {"rank": 2}, {"rank": 5}],
    "transform": [{"kind": kind} for kind in TRANSFORMS if kind not in COMPLEX],
}
"""Hyper-parameters beyond the proposals, tried wherever a shape takes them."""


def composed(name: str, n: int, m: int) -> list[Hyper]:
    """Products and sums, whose hyper-parameters have the shape in them."""
    rank = min(n, m, 2)
    if name == "sum":
        two = f"toeplitz({n},{m}); low_rank({n},{m},rank={rank})"
        nested = f"sum({n},{m},parts=[{two}]); hankel({n},{m})"
        return [{"parts": two}, {"parts": nested}]
    if name == "product":
        scaled = f"selection({n},{n}); diagonal({n},{n}); low_rank({n},{m},rank={rank})"
        inner = f"toeplitz({m},{m}); diagonal({m},{m})"
        return [{"parts": scaled}, {"parts": f"toeplitz({n},{m}); sum({m},{m},parts=[{inner}])"}]
    return []


ROUNDING = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
DTYPES = {str(d).removeprefix("torch."): d for d in ROUNDING}


learned_butterfly.RESTARTS, learned_butterfly.BATCHES = 2, 1  # the laws hold at any effort
learned_butterfly.STEPS, learned_butterfly.POLISH = 15, 20


@functools.cache
def hypers(family: type[AbstractFamily], n: int, m: int) -> list[Hyper]:
    """The proposals at both ends, and what ``MORE`` has, as far as the shape takes it."""
    proposed = list(family.proposals(n, m))
    more = [*MORE.get(family.name, []), *composed(family.name, n, m)]
    tried = [*proposed[:1], *proposed[-1:], *more]
    kept: list[Hyper] = []
    for hyper in tried:
        made = family.fit(torch.ones(m, n), **hyper)
        able = not isinstance(made, Refusal) or made.code == "NO_FIT"
        if able and hyper not in kept:
            kept.append(hyper)
    return kept


def home(family: type[AbstractFamily]) -> tuple[int, int]:
    """A shape that the family has: 24 x 40, or square ones alone, or powers of two."""
    return next(shape for shape in ((24, 40), (24, 24), (16, 16)) if hypers(family, *shape))


def label(family: type[AbstractFamily], n: int, m: int, hyper: Hyper) -> str:
    words = [
        family.name,
        f"in{n}",
        f"out{m}",
        *(f"{k.replace('_', '')}{v}" for k, v in hyper.items()),
    ]
    return "-".join(words)


CASES = [
    pytest.param(family, n, m, hyper, id=label(family, n, m, hyper))
    for family in FAMILIES
    for n, m in SHAPES.values()
    for hyper in hypers(family, n, m)
]
FAMILY_IDS = [f.name for f in FAMILIES]
FITTED = [f for f in FAMILIES if f.name != "product"]
"""Families with a fit; a product says why it has none."""
FITTED_IDS = [f.name for f in FITTED]
FITS = [c for c in CASES if c.values[0] in FITTED]
SLOW = {BY_NAME[name] for name in ("blast", "learned_butterfly", "displacement", "sum")}
"""Families whose fits take long: some of their cases are left to the long tests."""


def but_slow(cases: Iterable[tuple[Any, ...]], quick: Callable[..., bool]) -> list[Any]:
    """Cases that begin with a family; those of slow ones that are not quick are long tests."""
    return [
        pytest.param(*case, marks=pytest.mark.slow)
        if case[0] in SLOW and not quick(*case[1:])
        else case
        for case in cases
    ]


def random_member(
    family: type[AbstractFamily],
    n: int,
    m: int,
    hyper: Hyper,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = False,
    seed: int = 0,
) -> AbstractFamily:
    """A module with random factors, scaled so that outputs are of the size of inputs."""
    g = torch.Generator().manual_seed(seed)
    module = family.empty(n, m, hyper, dtype)
    for parameter in module.parameters():
        value = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        parameter.data = (value / max(value[0].numel(), 1) ** 0.5).to(dtype)
    for step, found in of_steps(module):
        if isinstance(step, Select):
            order = torch.randperm(max(step.m, step.n), generator=g)[: step.m]
            found[0].copy_(order % step.n)
    if bias:
        value = torch.randn(m, generator=g, dtype=torch.float64)
        module.bias = nn.Parameter(value.to(dtype))
    return module


def of_steps(module: AbstractFamily) -> list[tuple[Any, list[Tensor]]]:
    """The steps of a module's program, each with its factors; a dense form has no steps."""
    form, left = module.form(), iter(module.factors())
    if not isinstance(form, Tile):
        return []
    bias = isinstance(form.steps[-1], Bias)
    steps = form.steps[:-1] if bias else form.steps
    return [(step, [next(left) for _ in range(step.weights)]) for step in steps]


def products(module: AbstractFamily) -> list[list[Tensor]]:
    """The factors that are multiplied with each other; a sum has several such lists."""
    found: list[list[Tensor]] = [[]]
    for step, factors in of_steps(module):
        if isinstance(step, Load):
            found.append([])
        found[-1] += [f for f in factors if f.is_floating_point()]
    return [f for f in found if f]


def explicit(module: AbstractFamily) -> Tensor:
    """The module's matrix in float64, as a product of explicitly written matrices."""
    form = module.form()
    if isinstance(form, PackedDense):
        w = module.factors()[0].detach().double()
        return w if tuple(w.shape) == (form.out_features, form.in_features) else w.T
    matrix = torch.eye(form.in_features, dtype=torch.float64)
    slots = {0: matrix}
    for step, factors in of_steps(module):
        if isinstance(step, Keep):
            slots[step.index] = matrix
        elif isinstance(step, Load):
            matrix = slots[step.index]
        elif isinstance(step, Add):
            matrix = matrix + slots[step.index]
        else:
            matrix = matrix_of(step, factors) @ matrix
    return matrix


def matrix_of(step: Any, factors: list[Tensor]) -> Tensor:
    """A step that is a matrix, written out by the formula of its docstring; new steps join here."""
    wide = [f.detach().double() if f.is_floating_point() else f for f in factors]
    out = torch.zeros(step.out_features, step.in_features, dtype=torch.float64)
    if isinstance(step, Block):
        a, b, c, d = step.a, step.b, step.c, step.d
        w = wide[0].reshape(a, b, c, d)
        for al in range(a):
            for de in range(d):
                rows = [(al * b + be) * d + de for be in range(b)]
                columns = [(al * c + ga) * d + de for ga in range(c)]
                out[torch.tensor(rows)[:, None], torch.tensor(columns)] = w[al, :, :, de]
    elif isinstance(step, Shared):
        left, right = torch.eye(step.a).double(), torch.eye(step.d).double()
        out = torch.kron(left, torch.kron(wide[0].reshape(step.b, step.c), right))
    elif isinstance(step, Repeat):
        again = Block(step.a, step.b, step.c, step.d)
        return matrix_of(again, [wide[0].expand(step.a, -1, -1, -1)])
    elif isinstance(step, Permute):
        order = [i * step.q + j for j in range(step.q) for i in range(step.p)]
        out[range(len(order)), order] = 1.0
    elif isinstance(step, Select):
        out[range(step.m), wide[0]] = 1.0
    elif isinstance(step, Sparse):
        values, edges, columns = wide
        for row in range(step.m // step.b):
            for e in range(int(edges[row]), int(edges[row + 1])):
                down, right = row * step.b, int(columns[e]) * step.c
                out[down : down + step.b, right : right + step.c] += values[e]
    elif isinstance(step, SPECTRAL):
        out = spectral_matrix(step, wide)
    else:
        assert isinstance(step, (Bias, Act)), step
        out.fill_diagonal_(1.0)
    return out


def spectral_matrix(step: Any, factors: list[Tensor]) -> Tensor:
    n = step.in_features
    eye = torch.eye(n, dtype=torch.float64)
    if isinstance(step, Flip):
        return eye.flip(0)
    if isinstance(step, Convolve):
        out = torch.zeros(step.m, n, dtype=torch.float64)
        for i in range(step.m):
            for tap in range(step.taps):
                j = i + step.shift - tap
                if step.periodic or 0 <= j < n:
                    out[i, j % n] += factors[0][tap]
        return out
    if isinstance(step, Displace):
        return sum(_krylov(g, 1.0) @ _krylov(h, -1.0).T for g, h in zip(*factors, strict=True))
    assert isinstance(step, Transform)
    return torch.from_numpy(_named(step.kind, np.eye(n), step.n)).double()


def _krylov(g: Tensor, corner: float) -> Tensor:
    shift = torch.diag(torch.ones(len(g) - 1, dtype=torch.float64), -1)
    shift[0, -1] += corner
    columns = [g]
    for _ in range(len(g) - 1):
        columns.append(shift @ columns[-1])
    return torch.stack(columns, 1)


def _named(kind: str, eye: Any, n: int) -> Any:
    if kind[:3] in ("dct", "dst"):
        if (n, kind) == (1, "dct1"):
            return np.full((1, 1), 2.0)  # the formula at one point, where SciPy has none
        return getattr(fft, kind[:3])(eye, int(kind[3]), axis=0)
    if kind == "hadamard":
        return linalg.hadamard(n)
    if kind == "haar":
        half = _named("haar", eye, n // 2) if n > 1 else None
        ones = np.eye(n // 2)
        rows = [] if half is None else [np.kron(half, [1, 1]), np.kron(ones, [1, -1])]
        return np.eye(1) if half is None else np.concatenate(rows) * 0.5**0.5
    if kind == "irdft":
        re, im = np.split(eye, 2)
        return np.fft.irfft(re + 1j * im, n, axis=0)
    f = np.fft.rfft(eye, axis=0) if kind == "rdft" else np.fft.fft(eye, axis=0)
    return np.concatenate([f.real, f.imag]) if kind == "rdft" else f.real - f.imag


def gram_of(n: int, kind: str) -> Tensor:
    g = torch.Generator().manual_seed(5)
    if kind == "few":  # of fewer inputs than features, summed in float32: it is not semidefinite
        x = torch.randn(max(1, n // 5), n, generator=g)
        return x.T @ x / len(x)
    if kind == "outlier":  # two large features that go together, in bfloat16
        x = torch.randn(3 * n, n, generator=g)
        x[:, 0] *= 300
        x[:, -1] += 0.9 * x[:, 0]
        return (x.T @ x / len(x)).bfloat16()
    if kind == "constant":
        return torch.ones(n, n, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    t = torch.arange(1, n + 1, dtype=torch.float64)
    spectrum = {
        "identity": torch.ones(n, dtype=torch.float64),
        "mild": t**-1,
        "steep": t**-4,
        "singular": torch.where(t <= max(1, n // 3), t**-1, torch.zeros_like(t)),
        "zero": torch.zeros(n, dtype=torch.float64),
    }[kind]
    return (q * spectrum) @ q.mT


def weight_of(n: int, m: int, seed: int = 1) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(result: AbstractFamily | Refusal) -> AbstractFamily:
    assert not isinstance(result, Refusal), result.reason
    return result


# ---------------------------------------------------------------------------- the map itself


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("family, n, m, hyper", CASES)
def test_forward_is_the_matrix(family, n, m, hyper, dtype) -> None:
    for bias in (False, True):
        module = random_member(family, n, m, hyper, dtype, bias=bias)
        matrix = explicit(module)
        assert relative_error(module.to_dense(), matrix) < ROUNDING[dtype]
        x = torch.randn(7, n, dtype=torch.float64).to(dtype)
        want = x.double() @ matrix.T + (module.bias.detach().double() if bias else 0.0)
        y = module(x)
        assert y.dtype == dtype
        assert relative_error(y, want) < ROUNDING[dtype]


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_leading_dimensions(family, lead) -> None:
    n, m = home(family)
    module = random_member(family, n, m, hypers(family, n, m)[0], bias=True)
    x = torch.randn(*lead, n, dtype=torch.float64)
    y = module(x)
    assert y.shape == (*lead, m)
    assert relative_error(y, x @ explicit(module).T + module.bias) < 1e-13
    strided = torch.randn(*lead, 2 * n, dtype=torch.float64)[..., ::2]
    assert relative_error(module(strided), strided @ explicit(module).T + module.bias) < 1e-13


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_wrong_feature_count_is_an_error_not_a_wrong_answer(family) -> None:
    n, m = home(family)
    module = random_member(family, n, m, hypers(family, n, m)[0])
    with pytest.raises((RuntimeError, ValueError)):
        module(torch.randn(3, 23, dtype=torch.float64))


@pytest.mark.parametrize(
    "family, n, m, hyper", [c for c in CASES if c.values[1] * c.values[2] < 400]
)
def test_gradients(family, n, m, hyper) -> None:
    module = random_member(family, n, m, hyper, bias=True)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for _, p in module.named_parameters()]
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@pytest.mark.parametrize("family, n, m, hyper", CASES)
def test_form_is_known_before_fitting(family, n, m, hyper) -> None:
    for bias in (False, True):
        module = random_member(family, n, m, hyper, bias=bias)
        assert dict(module.hyper()) == dict(hyper)
        numbers = sum(f.numel() for f in module.factors() if f.is_floating_point())
        for activation in ("", *ACTIVATIONS):
            form = module.form(activation)
            known = family.form_of(n, m, module.hyper(), bias=bias, activation=activation)
            assert form == known and type(form).parse(str(form)) == form
            assert (form.in_features, form.out_features) == (n, m)
            if isinstance(form, Tile):
                assert form.weights == len(module.factors()) + bias
                assert form.params == numbers


@pytest.mark.parametrize("family, n, m, hyper", CASES)
def test_factors_are_what_the_module_holds(family, n, m, hyper) -> None:
    """Rewritten graphs read them by name."""
    module = random_member(family, n, m, hyper, bias=True)
    state = module.state_dict(keep_vars=True)
    named = [state[name] for name in module.factor_names()]
    assert all(a is b for a, b in zip(named, module.factors(), strict=True))


@pytest.mark.parametrize("family, n, m, hyper", CASES)
def test_cost_is_what_the_reference_does(family, n, m, hyper) -> None:
    module, rows = random_member(family, n, m, hyper, torch.float32), 6
    x, factors, form = torch.randn(rows, n), module.factors(), module.form()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if isinstance(form, PackedDense):
            reference.dense_reference(x, factors[0], None)
        else:
            reference.tile_reference(x, factors, str(form))
    steps = form.steps if isinstance(form, Tile) else ()
    alone = [s for s in steps if isinstance(s, Block) and s.c == 1 < s.a * s.d]
    alone += [s for s in steps if isinstance(s, Sparse) and s.c == 1]
    scales = sum(s.flops for s in alone)  # products of one number: the counter sees no matrix
    if not any(isinstance(s, SPECTRAL) for s in steps):  # of which the counter knows nothing
        assert rows * (form.flops - scales) == counter.get_total_flops()
    assert form.params == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("family, n, m, hyper", CASES)
def test_state_survives_disk(family, n, m, hyper, dtype) -> None:
    module = random_member(family, n, m, hyper, dtype, bias=True)
    stored = load(save({k: v.contiguous() for k, v in module.state_dict().items()}))
    again = family.empty(n, m, hyper, dtype)
    again.bias = nn.Parameter(torch.empty(m, dtype=dtype))
    again.load_state_dict(stored)
    x = torch.randn(5, n, dtype=torch.float64).to(dtype)
    assert torch.equal(again(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert all(torch.equal(a, b) for a, b in zip(again.factors(), module.factors(), strict=True))


# ---------------------------------------------------------------------------- fits


def first_of(family, n, m, hyper) -> bool:
    return family.name != "learned_butterfly" or hyper == MORE[family.name][2]


@pytest.mark.parametrize(
    "family, n, m, hyper",
    [
        pytest.param(*c.values, id=c.id, marks=[] if first_of(*c.values) else pytest.mark.slow)
        for c in FITS
    ],
)
def test_planted_weight_is_recovered(family, n, m, hyper, monkeypatch) -> None:
    for name, value in {"RESTARTS": 6, "STEPS": 200, "POLISH": 100}.items():
        monkeypatch.setattr(learned_butterfly, name, value)
    planted = explicit(random_member(family, n, m, hyper, seed=3))
    module = fitted(family.fit(planted, **hyper))
    if not family.finds_members:  # the best fit is not known; one is found that no noise would have
        assert module.error(planted) < max(0.9 * module.null_error(), 0.03)
        return
    assert relative_error(explicit(module), planted) < 1e-12
    assert module.error(planted) < 1e-12
    weighted = fitted(family.fit(planted, gram_of(n, "mild"), **hyper))
    assert relative_error(explicit(weighted), planted) < 1e-11


GRAMS = ("identity", "mild", "steep", "singular", "zero", "constant", "few", "outlier")


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("family, n, m, hyper", FITS)
def test_data_never_make_a_fit_worse(family, n, m, hyper, kind) -> None:
    weight, gram = weight_of(n, m), gram_of(n, kind)
    plain = fitted(family.fit(weight, **hyper))
    aware = fitted(family.fit(weight, gram, **hyper))
    assert all(bool(torch.isfinite(f).all()) for f in aware.factors())
    if gram.dtype != torch.float64:  # rounding, whose size negative eigenvalues tell, is no data
        values, vectors = torch.linalg.eigh(gram.double())
        gram = (vectors * torch.where(values > -2 * values[0], values, 0.0)) @ vectors.mT
    before, after = (weighted_error(weight, explicit(f), gram) for f in (plain, aware))
    assert after <= before * (1 + 1e-9) + 1e-7  # the root of what squares are rounded by


@pytest.mark.parametrize("family, n, m, hyper", CASES)
def test_outputs_mix_inside_their_blocks(family, n, m, hyper) -> None:
    """What a family says of itself lets fits weigh outputs: it must be so."""
    blocks = family.output_blocks(hyper)
    module = random_member(family, n, m, hyper, seed=5)
    if not blocks:
        with pytest.raises(NotImplementedError, match="not closed"):
            module.mix_outputs(torch.eye(m, dtype=torch.float64)[None])
        return
    mix = torch.randn(blocks, m // blocks, m // blocks, dtype=torch.float64)
    expected = torch.block_diag(*mix) @ explicit(module)
    module.mix_outputs(mix)
    torch.testing.assert_close(explicit(module), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family, n, m, hyper", [c for c in FITS if c.values[0] is not Dense])
def test_factors_share_the_scale(family, n, m, hyper) -> None:
    """No factor holds all of the scale, not even after a mix that spans many magnitudes."""
    weight, x = 100 * torch.randn(m, n).double(), torch.randn(5 * n, n).double()
    for gram in (None, x.T @ x / len(x)):
        module = family.fit(weight, gram, **hyper)
        for factors in products(module):
            norms = [float(f.detach().norm()) for f in factors]
            assert max(norms) < 1.001 * min(norms) + 1e-6, norms
        if blocks := module.output_blocks(hyper):
            size = m // blocks
            mix = torch.randn(blocks, size, size).double() * torch.logspace(-4, 4, size).double()
            module.mix_outputs(mix)
            for factors in products(module):
                norms = [float(f.detach().norm()) for f in factors]
                assert max(norms) < 1.001 * min(norms) + 1e-6, norms


@pytest.mark.parametrize("family", [f for f in FITTED if f.name != "sum"], ids=str)
def test_more_parameters_are_never_worse(family) -> None:
    n, m = (24, 36) if hypers(family, 24, 36) else home(family)
    weight = weight_of(n, m)
    curves: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for hyper in [*family.proposals(n, m), *MORE.get(family.name, [])]:
        for rank in range(1, 7) if "rank" in hyper else (0,):
            tried = {**hyper, "rank": rank} if rank else dict(hyper)
            module = family.fit(weight, **tried)
            if not isinstance(module, Refusal):
                key = tuple(v for k, v in tried.items() if k != "rank")
                curves.setdefault(key, []).append((rank, module.error(weight)))
    assert curves
    for points in curves.values():
        errors = [max(error, 1e-14) for _, error in sorted(set(points))]
        assert errors == sorted(errors, reverse=True), points


@pytest.mark.parametrize(
    "family, dtype",
    but_slow(itertools.product(FITTED, DTYPES.values()), lambda dtype: dtype == torch.bfloat16),
)
def test_fit_keeps_the_dtype_and_its_inputs(family, dtype) -> None:
    n, m = home(family)
    weight, gram = weight_of(n, m).to(dtype), gram_of(n, "mild")
    strided = torch.stack([weight, weight], 1)[:, 0]  # not contiguous
    kept, kept_gram = weight.clone(), gram.clone()
    for hyper in hypers(family, n, m):
        module = fitted(family.fit(strided, gram, **hyper))
        assert {f.dtype for f in module.factors()} <= {dtype, torch.int64}
        assert {p.dtype for p in module.parameters()} <= {dtype}
        assert module.to_dense().dtype == dtype
        wide = fitted(family.fit(weight.double(), gram, **hyper))
        gap = module.error(weight, gram) - wide.error(weight.double(), gram)
        assert abs(gap) < 4 * ROUNDING[dtype] + 1e-9
        again = fitted(family.fit(weight, gram, **hyper))
        assert all(map(torch.equal, module.factors(), again.factors()))
    assert torch.equal(weight, kept) and torch.equal(gram, kept_gram)


@pytest.mark.parametrize("family", FITTED, ids=FITTED_IDS)
def test_fit_of_an_expanded_weight_writes_nothing_through_it(family) -> None:
    row = torch.randn(1, 24, dtype=torch.float64)
    some = list(hypers(family, 24, 40))
    for hyper in some[:1] if family in SLOW else some:
        weight = row.expand(40, 24)
        module = fitted(family.fit(weight, gram_of(24, "mild"), **hyper))
        other = fitted(family.fit(weight.contiguous(), gram_of(24, "mild"), **hyper))
        assert torch.equal(explicit(module), explicit(other))
        if family in (BY_NAME["low_rank"], BY_NAME["monarch"]):  # one row: rank one is enough
            assert relative_error(explicit(module), weight) < 1e-11


# ---------------------------------------------------------------------------- refusals


def poisoned(value: float) -> Tensor:
    weight = weight_of(24, 40)
    weight[3, 5] = value
    return weight


REFUSED_WEIGHTS = {
    "nan": (poisoned(float("nan")), None, "NONFINITE"),
    "inf": (poisoned(float("inf")), None, "NONFINITE"),
    "no-rows": (torch.zeros(0, 24), None, "EMPTY"),
    "no-columns": (torch.zeros(40, 0), None, "EMPTY"),
    "vector": (torch.zeros(24), None, "NOT_A_MATRIX"),
    "cube": (torch.zeros(2, 40, 24), None, "NOT_A_MATRIX"),
    "integer": (torch.ones(40, 24, dtype=torch.int32), None, "DTYPE"),
    "bool": (torch.ones(40, 24, dtype=torch.bool), None, "DTYPE"),
    "complex": (torch.ones(40, 24, dtype=torch.complex64), None, "DTYPE"),
    "float8": (torch.ones(40, 24).to(torch.float8_e4m3fn), None, "DTYPE"),
    "gram-shape": (weight_of(24, 40), torch.eye(23), "GRAM_SHAPE"),
    "gram-nan": (weight_of(24, 40), torch.full((24, 24), float("nan")), "GRAM_NONFINITE"),
    "gram-asymmetric": (weight_of(24, 40), torch.eye(24) + torch.ones(24, 24).triu(), "NOT_A_GRAM"),
    "gram-negative": (weight_of(24, 40), -torch.eye(24), "NOT_A_GRAM"),
    "gram-indefinite": (weight_of(24, 40), 2.0 - torch.eye(24), "NOT_A_GRAM"),
    "gram-complex": (weight_of(24, 40), torch.eye(24).to(torch.complex64), "GRAM_DTYPE"),
    "meta": (torch.zeros(40, 24, device="meta"), None, "LAYOUT"),
    "huge": (1e200 * weight_of(24, 40), None, "RANGE"),
    "tiny": (1e-200 * weight_of(24, 40), None, "RANGE"),
}


@pytest.mark.parametrize("case", REFUSED_WEIGHTS.values(), ids=REFUSED_WEIGHTS.keys())
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_what_cannot_be_fitted_is_refused(family, case) -> None:
    weight, gram, code = case
    result = family.fit(weight, gram, **hypers(family, *home(family))[0])
    if family is Dense and code.startswith(("NONFINITE", "GRAM", "NOT_A_GRAM", "RANGE")):
        # the weight as it is: no data and no values can be wrong for it
        assert isinstance(result, Dense) and torch.equal(
            result.weight.nan_to_num(7.0), weight.nan_to_num(7.0)
        )
        return
    assert isinstance(result, Refusal)
    assert (result.code, result.family) == (code, family.name)
    assert len(result.reason.split()) >= 3
    if code == "NONFINITE":
        assert "1 weights" in result.reason and "(3, 5)" in result.reason


@pytest.mark.parametrize("rank", [-1, 0, 25, 10**9])
@pytest.mark.parametrize("family", [f for f in FAMILIES if "rank" in hypers(f, *home(f))[0]])
def test_ranks_outside_the_matrix_are_refused(family, rank) -> None:
    n, m = home(family)
    hyper = {**hypers(family, n, m)[0], "rank": rank}
    result = family.fit(weight_of(n, m), **hyper)
    assert isinstance(result, Refusal) and result.code == "RANK"
    assert str(rank) in result.reason


@pytest.mark.parametrize("grid", [(5, 4), (4, 7), (0, 4), (4, 0), (-2, 4), (24, 41)], ids=str)
def test_grids_that_do_not_divide_are_refused(grid) -> None:
    result = BY_NAME["monarch"].fit(
        weight_of(24, 40), in_blocks=grid[0], out_blocks=grid[1], rank=1
    )
    assert isinstance(result, Refusal) and result.code == "GRID"
    assert "24" in result.reason and "40" in result.reason


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_arguments_of_wrong_types_are_named(family) -> None:
    weight, hyper = weight_of(*home(family)), hypers(family, *home(family))[0]
    wrong = [(weight.numpy(), None, hyper), (weight.tolist(), None, hyper), (None, None, hyper)]
    wrong += [(weight, weight.numpy(), hyper), (weight, [[1.0]], hyper)]
    for key in hyper:
        wrong += [(weight, None, {**hyper, key: value}) for value in (2.0, True, None, [2])]
    for w, gram, arguments in wrong:
        with pytest.raises(ConfigError, match=rf"{family.__name__}\.fit: \w+: expected .*, got"):
            family.fit(w, gram, **arguments)


def awkward() -> dict[str, tuple[Tensor, Tensor | None]]:
    """Values and data that decompositions stumble over."""
    n, m = 24, 40
    weight, ones = weight_of(n, m), torch.ones(40, 24, dtype=torch.float64)
    t = torch.linspace(0, 12, n, dtype=torch.float64)
    rows = torch.randn(3, n, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    dead = torch.eye(n, dtype=torch.float64)
    dead[:12] = 0.0
    q = torch.linalg.qr(gram_of(n, "mild"))[0]
    return {
        "zero": (0 * weight, None),
        "zero-weighted": (0 * weight, gram_of(n, "mild")),
        "ones": (ones, gram_of(n, "steep")),
        "one-entry": (
            torch.zeros_like(weight).index_put((torch.tensor(5), torch.tensor(7)), ones[0, 0]),
            None,
        ),
        "identity": (torch.eye(n, dtype=torch.float64), None),
        "dead-inputs": (weight, dead),
        "three-samples": (weight, rows.T @ rows),
        "one-sample": (weight, rows[:1].T @ rows[:1]),
        "condition-1e12": (weight, (q * 10**-t) @ q.mT),
        "condition-1e24": (weight, (q * 10 ** (-2 * t)) @ q.mT),
        "tiny-gram": (weight, 1e-290 * gram_of(n, "mild")),
        "huge-gram": (weight, 1e290 * gram_of(n, "mild")),
        "tiny-weight": (1e-90 * weight, gram_of(n, "mild")),
        "huge-weight": (1e90 * weight, gram_of(n, "mild")),
        "steep-weight": (weight * 10**-t, gram_of(n, "mild")),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", awkward())
@pytest.mark.parametrize("family", FITTED, ids=FITTED_IDS)
def test_awkward_values_are_fitted_or_refused(family, name) -> None:
    weight, gram = awkward()[name]
    for hyper in hypers(family, weight.shape[1], weight.shape[0]):
        module = family.fit(weight, gram, **hyper)
        if isinstance(module, Refusal):
            assert len(module.reason.split()) >= 3
            continue
        assert all(bool(torch.isfinite(f).all()) for f in module.factors())
        assert module.fit_error >= 0
        if family.scales:
            assert module.fit_error <= 1 + 1e-9  # nothing at all has an error of 1


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_half_precision_overflow_is_refused_not_infinite(family) -> None:
    weight = torch.full((40, 24), 60000.0, dtype=torch.float16)
    for hyper in hypers(family, 24, 40):
        module = family.fit(weight, gram_of(24, "mild"), **hyper)
        if isinstance(module, Refusal):
            assert module.code in ("OVERFLOW", "NO_FIT")
            assert "float16" in module.reason or module.code == "NO_FIT"
        else:
            assert all(bool(torch.isfinite(f).all()) for f in module.factors())


# ---------------------------------------------------------------------------- error and null


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("family", FITTED, ids=FITTED_IDS)
def test_a_fit_carries_the_error_of_what_it_stores(family, dtype) -> None:
    n, m = home(family)
    weight, gram = weight_of(n, m).to(dtype), gram_of(n, "mild")
    for hyper in hypers(family, n, m):
        for used in (None, gram):
            module = fitted(family.fit(weight, used, **hyper))
            expected = weighted_error(weight, explicit(module), used)
            assert module.fit_error == pytest.approx(
                expected, rel=max(1e-3, torch.finfo(dtype).eps), abs=1e-6
            )
    assert torch.isnan(torch.tensor(random_member(family, n, m, hyper).fit_error))


@pytest.mark.parametrize(
    "family, n, m",
    but_slow(
        ((f, *s) for f in FAMILIES for s in ((96, 96), (192, 64), (64, 192), (240, 160))),
        lambda n, m: (n, m) == (192, 64),
    ),
)
def test_null_is_what_noise_gives(family, n, m) -> None:
    """Within a hundredth, also where the null comes from a formula or from a smaller matrix."""
    for hyper in family.proposals(n, m):
        modules = [fitted(family.fit(weight_of(n, m, seed), **hyper)) for seed in range(4, 8)]
        assert modules[0].null_error() == family.null(n, m, hyper)
        reached = sum(module.fit_error for module in modules) / len(modules)
        assert family.null(n, m, hyper) == pytest.approx(reached, abs=0.01)


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_triton_kernels(family) -> None:
    """Each form runs on kernels for GPUs, here under Triton's interpreter, or says why not."""
    pytest.importorskip("triton", reason="triton is not installed")
    from structc.codegen.triton.plan import plans
    from structc.codegen.triton.targets import target_of
    from structc.codegen.triton.tile import analyse, make

    n, m = home(family)
    for hyper in hypers(family, n, m):
        module = random_member(family, n, m, hyper, torch.float32, bias=True)
        form = module.form("relu")
        if isinstance(form, PackedDense):
            form = Tile.parse(f"block(1,{m},{n},1) bias({m}) act(relu,{m})")
        program = analyse(form, torch.float32)
        if isinstance(program, Refusal):
            assert program.code == "SPECTRAL" and program.reason
            assert any(isinstance(s, SPECTRAL) for s in form.steps)
            continue
        x = torch.randn(7, n)
        want = x.double() @ module.to_dense().detach().double().T + module.bias.detach().double()
        for plan in plans(program, 7, "fp32", target_of("cuda:90")):
            kernel = make(form, torch.float32, plan)
            assert not isinstance(kernel, Refusal), kernel
            got = kernel(x, [*(f.detach() for f in module.factors()), module.bias.detach()])
            assert relative_error(got, want.relu()) <= 1e-5, (str(form), str(plan))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_null_of_a_large_weight_is_sampled_at_a_small_one(family, monkeypatch) -> None:
    for n, m in ((4096, 4096), (1024, 4096)):
        for hyper in family.proposals(n, m):
            seen: list[Tensor] = []
            fit = family.fit
            monkeypatch.setattr(
                family, "fit", lambda w, *a, f=fit, s=seen, **k: s.append(w) or f(w, *a, **k)
            )
            assert 0 <= family.null(n, m, hyper) < 1
            monkeypatch.undo()
            assert all(w.numel() <= 512 * 512 for w in seen)


# ---------------------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 70), m=st.integers(1, 70))
def test_proposals_are_smaller_than_dense_and_fit(n: int, m: int) -> None:
    weight = torch.ones(m, n)
    for family in FAMILIES:
        sizes = []
        for hyper in family.proposals(n, m):
            form = family.form_of(n, m, hyper, bias=False, activation="")
            assert (form.in_features, form.out_features) == (n, m)
            assert family is Dense or form.params < n * m
            sizes.append(form.params)
        for hyper in list(family.proposals(n, m))[-1:]:
            assert not isinstance(family.fit(weight, **hyper), Refusal)
        assert len(sizes) == len(set(map(str, family.proposals(n, m))))


@pytest.mark.parametrize("family, n, m, hyper", CASES)
def test_to_dense_is_affine_in_each_factor(family, n, m, hyper) -> None:
    module = random_member(family, n, m, hyper, seed=9)

    def dense(parameter: nn.Parameter, value: Tensor) -> Tensor:
        with torch.no_grad():
            old = parameter.clone()
            parameter.copy_(value)
            made = module.to_dense().detach().clone()
            parameter.copy_(old)
        return made

    for name, parameter in module.named_parameters():
        start, step = parameter.detach().clone(), torch.randn_like(parameter)
        zero = dense(parameter, start)
        one, two = (dense(parameter, start + f * step) - zero for f in (1.0, 2.0))
        assert torch.allclose(two, 2 * one, atol=1e-10), name


def test_every_structured_family_gives_its_weight_back() -> None:
    for family in FAMILIES:
        n, m = home(family)
        module = random_member(family, n, m, hypers(family, n, m)[0])
        if isinstance(module, AbstractStructured):
            assert module.weight.shape == (m, n)
            module.transposed = True
            assert torch.equal(module.weight, module.to_dense().T)
