"""The laws of a structure family. A line in ``FAMILIES`` is the act of joining this suite.

The dense form that everything is held against is built here, from the factors and the program, as a
product of explicit matrices: it shares no code with ``forward`` or ``to_dense``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from structc import reference
from structc.families import BY_NAME, FAMILIES, AbstractFamily, AbstractStructured, Dense
from structc.forms import ACTIVATIONS, Act, Bias, Block, PackedDense, Permute, Tile
from structc.numerics import relative_error, weighted_error
from structc.records import Refusal

SHAPES = {  # in_features, out_features
    "square": (24, 24),
    "tall": (24, 40),
    "wide": (40, 24),
    "odd": (15, 21),
    "prime": (13, 17),
    "one-in": (1, 16),
    "one-out": (16, 1),
    "one-one": (1, 1),
}
MORE: dict[str, list[dict[str, int]]] = {
    "low_rank": [{"rank": 1}, {"rank": 5}],
    "monarch": [
        {"in_blocks": 3, "out_blocks": 3, "rank": 2},
        {"in_blocks": 5, "out_blocks": 3, "rank": 3},
        {"in_blocks": 8, "out_blocks": 4, "rank": 2},
        {"in_blocks": 1, "out_blocks": 1, "rank": 1},
    ],
}
"""Hyper-parameters beyond the proposals, tried wherever a shape takes them."""
ROUNDING = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
DTYPES = {str(d).removeprefix("torch."): d for d in ROUNDING}


def hypers(family: type[AbstractFamily], n: int, m: int) -> list[Mapping[str, int]]:
    """The proposals at both ends, and what ``MORE`` has, as far as the shape takes it."""
    proposed = list(family.proposals(n, m))
    tried = [*proposed[:1], *proposed[-1:], *MORE.get(family.name, [])]
    kept: list[Mapping[str, int]] = []
    for hyper in tried:
        fits = not isinstance(family.fit(torch.ones(m, n), **hyper), Refusal)
        if fits and hyper not in kept:
            kept.append(hyper)
    return kept


def label(family: type[AbstractFamily], n: int, m: int, hyper: Mapping[str, int]) -> str:
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


def random_member(
    family: type[AbstractFamily],
    n: int,
    m: int,
    hyper: Mapping[str, int],
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
    if bias:
        value = torch.randn(m, generator=g, dtype=torch.float64)
        module.bias = nn.Parameter(value.to(dtype))
    return module


def explicit(module: AbstractFamily) -> Tensor:
    """The module's matrix in float64, as a product of explicitly written matrices."""
    form, factors = module.form(), [f.detach().double() for f in module.factors()]
    if isinstance(form, PackedDense):
        (w,) = factors
        return w if tuple(w.shape) == (form.out_features, form.in_features) else w.T
    matrix = torch.eye(form.in_features, dtype=torch.float64)
    left = iter(factors)
    for step in form.steps:
        matrix = _matrix_of(step, left) @ matrix
    return matrix


def _matrix_of(step: Any, factors: Any) -> Tensor:
    if isinstance(step, Block):
        a, b, c, d = step.a, step.b, step.c, step.d
        w = next(factors).reshape(a, b, c, d)
        out = torch.zeros(a * b * d, a * c * d, dtype=torch.float64)
        for al in range(a):
            for de in range(d):
                rows = [(al * b + be) * d + de for be in range(b)]
                columns = [(al * c + ga) * d + de for ga in range(c)]
                out[torch.tensor(rows)[:, None], torch.tensor(columns)] = w[al, :, :, de]
        return out
    if isinstance(step, Permute):
        order = [i * step.q + j for j in range(step.q) for i in range(step.p)]
        return torch.eye(len(order), dtype=torch.float64)[order]
    assert isinstance(step, (Bias, Act))
    return torch.eye(step.in_features, dtype=torch.float64)


def gram_of(n: int, kind: str) -> Tensor:
    g = torch.Generator().manual_seed(5)
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
    n, m = 24, 40
    module = random_member(family, n, m, hypers(family, n, m)[0], bias=True)
    x = torch.randn(*lead, n, dtype=torch.float64)
    y = module(x)
    assert y.shape == (*lead, m)
    assert relative_error(y, x @ explicit(module).T + module.bias) < 1e-13
    strided = torch.randn(*lead, 2 * n, dtype=torch.float64)[..., ::2]
    assert relative_error(module(strided), strided @ explicit(module).T + module.bias) < 1e-13


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_wrong_feature_count_is_an_error_not_a_wrong_answer(family) -> None:
    module = random_member(family, 24, 40, hypers(family, 24, 40)[0])
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


@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("family, n, m, hyper", CASES)
def test_form_is_known_before_fitting(family, n, m, hyper, bias, activation) -> None:
    module = random_member(family, n, m, hyper, bias=bias)
    form = module.form(activation)
    assert form == family.form_of(n, m, module.hyper(), bias=bias, activation=activation)
    assert dict(module.hyper()) == dict(hyper)
    assert (form.in_features, form.out_features) == (n, m)
    assert type(form).parse(str(form)) == form
    if isinstance(form, Tile):
        assert form.weights == len(module.factors()) + bias
        shapes = [(s.a * s.b * s.c * s.d) for s in form.steps if isinstance(s, Block)]
        assert shapes == [f.numel() for f in module.factors()]


@pytest.mark.parametrize("family, n, m, hyper", CASES)
def test_cost_is_what_the_reference_does(family, n, m, hyper) -> None:
    module, rows = random_member(family, n, m, hyper, torch.float32), 6
    x, factors, form = torch.randn(rows, n), module.factors(), module.form()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if isinstance(form, PackedDense):
            reference.dense_reference(x, factors[0], None)
        else:
            reference.tile_reference(x, factors, str(form))
    assert rows * form.flops == counter.get_total_flops()
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


@pytest.mark.parametrize("family, n, m, hyper", CASES)
def test_planted_weight_is_recovered(family, n, m, hyper) -> None:
    planted = explicit(random_member(family, n, m, hyper, seed=3))
    module = fitted(family.fit(planted, **hyper))
    assert relative_error(explicit(module), planted) < 1e-12
    assert module.error(planted) < 1e-12
    weighted = fitted(family.fit(planted, gram_of(n, "mild"), **hyper))
    assert relative_error(explicit(weighted), planted) < 1e-11


@pytest.mark.parametrize("kind", ["identity", "mild", "steep", "singular", "zero"])
@pytest.mark.parametrize("family, n, m, hyper", CASES)
def test_data_never_make_a_fit_worse(family, n, m, hyper, kind) -> None:
    weight, gram = weight_of(n, m), gram_of(n, kind)
    plain = fitted(family.fit(weight, **hyper))
    aware = fitted(family.fit(weight, gram, **hyper))
    assert all(bool(torch.isfinite(f).all()) for f in aware.factors())
    before, after = (weighted_error(weight, explicit(f), gram) for f in (plain, aware))
    assert after <= before * (1 + 1e-9) + 1e-9


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


@pytest.mark.parametrize("family, n, m, hyper", [c for c in CASES if c.values[0] is not Dense])
def test_factors_share_the_scale(family, n, m, hyper) -> None:
    """No factor holds all of the scale, not even after a mix that spans many magnitudes."""
    weight, x = 100 * torch.randn(m, n).double(), torch.randn(5 * n, n).double()
    for gram in (None, x.T @ x / len(x)):
        module = family.fit(weight, gram, **hyper)
        norms = [float(f.detach().norm()) for f in module.factors()]
        assert max(norms) < 1.001 * min(norms), norms
        if blocks := module.output_blocks(hyper):
            size = m // blocks
            mix = torch.randn(blocks, size, size).double() * torch.logspace(-4, 4, size).double()
            module.mix_outputs(mix)
            norms = [float(f.detach().norm()) for f in module.factors()]
            assert max(norms) < 1.001 * min(norms), norms


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_more_parameters_are_never_worse(family) -> None:
    n, m = 24, 36
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
        errors = [error for _, error in sorted(set(points))]
        assert errors == sorted(errors, reverse=True), points


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_fit_keeps_the_dtype_and_its_inputs(family, dtype) -> None:
    n, m = 24, 40
    weight, gram = weight_of(n, m).to(dtype), gram_of(n, "mild")
    strided = torch.stack([weight, weight], 1)[:, 0]  # not contiguous
    kept, kept_gram = weight.clone(), gram.clone()
    for hyper in hypers(family, n, m):
        module = fitted(family.fit(strided, gram, **hyper))
        assert {f.dtype for f in module.factors()} == {dtype}
        wide = fitted(family.fit(weight.double(), gram, **hyper))
        gap = module.error(weight, gram) - wide.error(weight.double(), gram)
        assert abs(gap) < 4 * ROUNDING[dtype] + 1e-9
        again = fitted(family.fit(weight, gram, **hyper))
        assert all(map(torch.equal, module.factors(), again.factors()))
    assert torch.equal(weight, kept) and torch.equal(gram, kept_gram)


def test_fit_of_an_expanded_weight_writes_nothing_through_it() -> None:
    row = torch.randn(1, 24, dtype=torch.float64)
    for family in FAMILIES:
        for hyper in hypers(family, 24, 40):
            module = fitted(family.fit(row.expand(40, 24), gram_of(24, "mild"), **hyper))
            assert relative_error(explicit(module), row.expand(40, 24)) < 1e-11


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
}


@pytest.mark.parametrize("case", REFUSED_WEIGHTS.values(), ids=REFUSED_WEIGHTS.keys())
@pytest.mark.parametrize("family", FAMILIES, ids=FAMILY_IDS)
def test_what_cannot_be_fitted_is_refused(family, case) -> None:
    weight, gram, code = case
    result = family.fit(weight, gram, **hypers(family, 24, 40)[0])
    if family is Dense and code.startswith(("NONFINITE", "GRAM")):
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
@pytest.mark.parametrize("family", [f for f in FAMILIES if "rank" in f.proposals(24, 40)[0]])
def test_ranks_outside_the_matrix_are_refused(family, rank) -> None:
    hyper = {**family.proposals(24, 40)[0], "rank": rank}
    result = family.fit(weight_of(24, 40), **hyper)
    assert isinstance(result, Refusal) and result.code == "RANK"
    assert str(rank) in result.reason


@pytest.mark.parametrize("grid", [(5, 4), (4, 7), (0, 4), (4, 0), (-2, 4), (24, 41)], ids=str)
def test_grids_that_do_not_divide_are_refused(grid) -> None:
    result = BY_NAME["monarch"].fit(
        weight_of(24, 40), in_blocks=grid[0], out_blocks=grid[1], rank=1
    )
    assert isinstance(result, Refusal) and result.code == "GRID"
    assert "24" in result.reason and "40" in result.reason


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


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(FAMILIES),
    i=st.integers(1, 6),
    l=st.integers(1, 6),
    k=st.integers(1, 4),
    j=st.integers(1, 4),
    rank=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_to_dense_is_linear_in_each_factor(family, i, l, k, j, rank, seed) -> None:
    hyper = {
        "dense": {},
        "low_rank": {"rank": min(rank, k * i, j * l)},
        "monarch": {"in_blocks": k, "out_blocks": j, "rank": min(rank, i, l)},
    }.get(family.name)
    if hyper is None:
        return
    n, m = k * i, j * l
    module = random_member(family, n, m, hyper, seed=seed)
    assert relative_error(module.to_dense(), explicit(module)) < 1e-13
    before = module.to_dense().detach()
    for name, parameter in list(module.named_parameters()):
        other = torch.randn_like(parameter)
        with torch.no_grad():
            old = parameter.clone()
            parameter.copy_(other)
            alone = module.to_dense().detach().clone()
            parameter.copy_(old + 2.0 * other)
            both = module.to_dense().detach().clone()
            parameter.copy_(old)
        assert torch.allclose(both, before + 2.0 * alone, atol=1e-10), name


def test_every_structured_family_gives_its_weight_back() -> None:
    for family in FAMILIES:
        module = random_member(family, 24, 40, hypers(family, 24, 40)[0])
        if isinstance(module, AbstractStructured):
            assert module.weight.shape == (40, 24)
            module.transposed = True
            assert torch.equal(module.weight, module.to_dense().T)
