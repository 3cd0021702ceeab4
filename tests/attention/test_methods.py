"""The contract of every attention method, and what each one finds exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from structc.attention import (
    METHODS,
    AbstractMethod,
    BlockSparse,
    ConvBasis,
    Monarch,
    Nystrom,
    Polynomial,
    RowColumnToeplitz,
    SparseLowRank,
    TiledMonarch,
    ToeplitzPolynomial,
    Uniform,
    WindowSinks,
    certify,
    exact,
    merge,
)
from structc.attention.feature_sums import features, monomials
from structc.attention.polynomial import minimax
from structc.errors import ConfigError
from structc.numerics import relative_error
from structc.records import Refusal

SAMPLES: dict[str, AbstractMethod] = {
    "uniform": Uniform(),
    "uniform causal": Uniform(is_causal=True),
    "window": WindowSinks(9, 2, is_causal=False),
    "window causal": WindowSinks(9, 2),
    "conv basis": ConvBasis(3, lags=4),
    "row + column + lag": RowColumnToeplitz(is_causal=False),
    "row + column + lag causal": RowColumnToeplitz(),
    "polynomial": Polynomial(2, 1.0, scale=0.1),
    "polynomial 3 causal": Polynomial(3, 1.0, is_causal=True, scale=0.1),
    "polynomial 1 centred": Polynomial(1, 0.5, center=True, scale=0.05),
    "toeplitz x polynomial, slopes": ToeplitzPolynomial(2, slopes=(0.1,), scale=0.1),
    "toeplitz x polynomial, slopes causal": ToeplitzPolynomial(
        3, is_causal=True, slopes=(0.3,), scale=0.1
    ),
    "toeplitz x polynomial, lags": ToeplitzPolynomial(2, lags=((0.5, 0.1, 0, 1, -0.3),), scale=0.1),
    "rope x polynomial causal": ToeplitzPolynomial(
        1, is_causal=True, frequencies=(0.7,), scale=0.1
    ),
    "fastmax": Polynomial(2, 1.0, taylor=True, normalize=True),
    "monarch": Monarch(7, 2),
    "monarch 1": Monarch(5, 1),
    "monarch extra": Monarch(6, 3, extra=1),
    "monarch causal": Monarch(5, 2, is_causal=True),
    "tiles": TiledMonarch((4, 6), (2, 2)),
    "tiles of frames, extra": TiledMonarch((2, 2, 3), (2, 1, 1), 1, extra=1),
    "blocks": BlockSparse(0.6, 16),
    "blocks causal": BlockSparse(0.6, 16, is_causal=True),
    "antidiagonals": BlockSparse(0.6, 16, is_causal=True, stride=4),
    "sparse + low rank": SparseLowRank(5, 2, 2, 1.0, scale=0.1),
    "sparse + low rank causal": SparseLowRank(5, 2, 2, 1.0, is_causal=True, scale=0.1),
    "nystrom": Nystrom(8),
}
NAMES = list(SAMPLES)


@pytest.mark.parametrize("name", NAMES)
def test_no_queries_and_no_keys(name: str) -> None:
    q, k, v = qkv(0)
    assert SAMPLES[name](q, k, v).shape == (*q.shape[:3], v.shape[-1])
    assert SAMPLES[name].matrix(q, k).shape == (*q.shape[:3], 0)


@pytest.mark.parametrize("name", NAMES)
def test_no_sequences(name: str) -> None:
    q, k, v = (t[:0] for t in qkv(served(SAMPLES[name], 20)))
    assert SAMPLES[name](q, k, v).shape == (*q.shape[:3], v.shape[-1])
    assert SAMPLES[name].matrix(q, k).shape == (*q.shape[:3], k.shape[2])


@pytest.mark.parametrize("name", NAMES)
def test_large_scores_give_numbers(name: str) -> None:
    """Scores around a thousand: their exponentials alone are infinite."""
    q, k, v = (t.float() for t in qkv(served(SAMPLES[name], 61)))
    y = SAMPLES[name](q * 1000, k, v)
    assert y.isfinite().all()


@pytest.fixture(autouse=True)
def short_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tests reach what is done in halves and in chunks."""
    monkeypatch.setattr("structc.attention.monarch.LEAF", 16)
    monkeypatch.setattr("structc.attention.feature_sums.CHUNK", 16)
    monkeypatch.setattr("structc.attention.sparse_low_rank.CHUNK", 16)


def qkv(n: int = 61, m: int | None = None, d: int = 6, **to: Any) -> tuple[Tensor, Tensor, Tensor]:
    m = n if m is None else m
    to = {"dtype": torch.float64, **to}
    return (
        torch.randn(2, 2, n, d, **to),
        torch.randn(2, 2, m, d, **to),
        torch.randn(2, 2, m, 5, **to),
    )


def served(method: AbstractMethod, n: int) -> int:
    """n, or the first length that the method serves where it does not serve n."""
    return next(m for m in (n, *range(1, 99)) if method.applies(m, m) is None)


def is_causal(method: AbstractMethod) -> bool:
    return bool(getattr(method, "is_causal", False))


def test_every_method_has_a_sample() -> None:
    assert {type(m) for m in SAMPLES.values()} == set(METHODS)
    assert {m.name for m in METHODS} == {type(m).name for m in SAMPLES.values()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 2, 13, 61, 64])
def test_output_is_the_matrix_times_values(name: str, n: int) -> None:
    method = SAMPLES[name]
    q, k, v = qkv(n)
    if isinstance(method.applies(n, n), Refusal):
        pytest.skip("refused")
    y, matrix = method(q, k, v), method.matrix(q, k)
    assert y.shape == (2, 2, n, 5) and matrix.shape == (2, 2, n, n)
    assert relative_error(y, matrix @ v) < 1e-9
    assert relative_error(matrix.sum(-1), torch.ones(2, 2, n)) < 1e-9 or name == "nystrom"
    if is_causal(method):
        assert not matrix.triu(1).any()


@pytest.mark.parametrize("name", [n for n in NAMES if SAMPLES[n].applies(20, 33) is None])
@pytest.mark.parametrize(("n", "m"), [(20, 33), (33, 20)])
def test_other_lengths_of_keys(name: str, n: int, m: int) -> None:
    method = SAMPLES[name]
    q, k, v = qkv(n, m)
    assert relative_error(method(q, k, v), method.matrix(q, k) @ v) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_float32_and_bfloat16(name: str) -> None:
    method = SAMPLES[name]
    q, k, v = (t.to(torch.bfloat16) for t in qkv(served(method, 61)))
    want = method(q.double(), k.double(), v.double())
    assert method(q, k, v).dtype == torch.bfloat16
    assert relative_error(method(q.float(), k.float(), v.float()), want) < 1e-3
    if name not in ("nystrom", "conv basis", "antidiagonals"):  # a rounded score may choose another
        assert relative_error(method(q, k, v), want) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    method = SAMPLES[name]
    q, k, v = (t[:1, :1].detach().requires_grad_() for t in qkv(served(method, 18), d=2))
    if name != "nystrom":  # of a pseudo-inverse they are large
        torch.autograd.gradcheck(method, (q, k, v), atol=1e-4)
    got = torch.autograd.grad(method(q, k, v).square().sum(), (q, k, v), allow_unused=True)
    other = torch.autograd.grad(
        (method.matrix(q, k) @ v).square().sum(), (q, k, v), allow_unused=True
    )
    for a, b in zip(got, other, strict=True):
        gap = relative_error(torch.zeros(1) if a is None else a, torch.zeros(1) if b is None else b)
        assert gap < 1e-6


@pytest.mark.parametrize("name", [n for n in NAMES if is_causal(SAMPLES[n])])
def test_later_keys_change_nothing(name: str) -> None:
    method = SAMPLES[name]
    q, k, v = qkv()
    before = method(q, k, v)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 40:], v2[:, :, 40:] = torch.randn(2, 2, 21, 6), 9.0
    if name == "row + column + lag causal":
        pytest.skip("its fit looks at the scores of all queries")
    if name in ("blocks causal", "antidiagonals", "conv basis"):  # what is kept is chosen in blocks
        assert relative_error(method(q, k2, v2)[:, :, :32], before[:, :, :32]) < 1e-9
    else:
        assert relative_error(method(q, k2, v2)[:, :, :40], before[:, :, :40]) < 1e-12


@pytest.mark.parametrize("name", [n for n in NAMES if type(SAMPLES[n]).certified])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), loud=st.floats(0.05, 3))
def test_row_sums_are_the_divergence(name: str, seed: int, loud: float) -> None:
    """``lse_true - lse`` is the divergence of the row, and the bounds hold."""
    torch.manual_seed(seed)
    method = SAMPLES[name]
    n = served(method, 30)
    q, k, v = qkv(n)
    q = loud * q
    y, lse = method.attend(q, k, v)
    assert lse is not None
    scores = method.sigma(q) * (q @ k.mT)
    if is_causal(method):
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
    true = scores.softmax(-1)
    p = method.matrix(q, k).clamp(min=0)
    kl = torch.where(p > 1e-300, p * (p.clamp(min=1e-300).log() - true.clamp(min=1e-300).log()), 0)
    assert torch.allclose(scores.logsumexp(-1) - lse, kl.sum(-1), atol=1e-5)
    told = certify(method, q, k, v, is_causal=is_causal(method), rows=n)
    tv = (p - true).abs().sum(-1) / 2
    spread = (v[:, :, :, None] - v[:, :, None]).norm(dim=-1).flatten(2).amax(-1)
    assert bool(((y - true @ v).norm(dim=-1) <= tv * spread[..., None] + 1e-9).all())
    assert told.worst_tv >= float(tv.max()) - 1e-3 and told.worst_kl >= -1e-9


@pytest.mark.parametrize("name", NAMES)
def test_certificates_of_all(name: str) -> None:
    method = SAMPLES[name]
    n = served(method, 40)
    q, k, v = qkv(n)
    told = certify(method, 0.1 * q, k, v, is_causal=is_causal(method), rows=n)
    assert told.rows == n and 0 <= told.tv <= told.worst_tv and told.error >= 0
    assert told.bound >= 0


LONG: dict[str, Callable[[int], AbstractMethod]] = {
    # what one would take for a length: blocks of a Monarch matrix grow with its root
    "uniform": lambda n: Uniform(is_causal=True),
    "window": lambda n: WindowSinks(64, 4),
    "conv basis": lambda n: ConvBasis(2),
    "row + column + lag": lambda n: RowColumnToeplitz(is_causal=False),
    "row + column + lag causal": lambda n: RowColumnToeplitz(scale=0.1),
    "polynomial": lambda n: Polynomial(2, 1.0),
    "polynomial causal": lambda n: Polynomial(2, 1.0, is_causal=True),
    "toeplitz x polynomial, slopes": lambda n: ToeplitzPolynomial(2, slopes=(0.1,)),
    "rope x polynomial": lambda n: ToeplitzPolynomial(1, frequencies=(0.1, 0.01)),
    "monarch": lambda n: Monarch(math.isqrt(n), 2),
    "monarch causal": lambda n: Monarch(math.isqrt(n), 2, is_causal=True),
    "tiled monarch": lambda n: TiledMonarch((math.isqrt(n), math.isqrt(n)), (2, 2)),
    "blocks": lambda n: BlockSparse(0.01, 64),
    "sparse + low rank": lambda n: SparseLowRank(64, 4, is_causal=True),
    "nystrom": lambda n: Nystrom(64),
}


def largest_tensor(method: AbstractMethod, n: int) -> int:
    """Bytes of the largest tensor that a call makes."""
    q, k, v = (torch.randn(1, 1, n, 6) for _ in range(3))
    with torch.no_grad(), Largest() as seen:
        method(q, k, v)
    return seen.bytes


class Largest(TorchDispatchMode):
    """The largest storage that an operator gives."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("name", LONG)
def test_no_matrix_of_all_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory grows with the length (Monarch: with its power 1.5), not with its square."""
    monkeypatch.setattr("structc.attention.feature_sums.SLAB", 1 << 14)
    monkeypatch.setattr("structc.attention.toeplitz_polynomial.SLAB", 1 << 14)
    monkeypatch.setattr("structc.softmax.ELEMENTS", 1 << 14)
    monkeypatch.setattr("structc.attention.row_column_toeplitz.SLAB", 1 << 14)
    small, large = (largest_tensor(LONG[name](n), n) for n in (1024, 4096))
    power = 1.5 if "monarch" in name else 1.0
    if name != "blocks":  # its estimate is the matrix of the blocks
        assert large <= 1.2 * 4**power * small
    assert large < 4096 * 4096 * 4 / 8


@pytest.mark.parametrize("name", LONG)
def test_costs_grow_as_they_should(name: str) -> None:
    small, large = (LONG[name](n).flops(n, n, 64) for n in (4096, 16384))
    assert 0 < small < large and (large / small < 9 or name == "blocks")


# ---------------------------------------------------------------------------- planted


def planted(n: int, starts: list[int], d: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k whose scores have these segments, and the columns."""
    columns = torch.randn(len(starts), n, dtype=torch.float64)
    scores = torch.zeros(n, n, dtype=torch.float64)
    for j in range(n):
        s = max(i for i, start in enumerate(starts) if start <= j)
        scores[j:, j] = columns[s, : n - j]
    q = torch.eye(n, dtype=torch.float64)[None, None]
    return q, scores.T[None, None], columns


@pytest.mark.parametrize("starts", [[0], [0, 30], [0, 1, 40], [0, 11, 57, 90, 100]])
def test_conv_basis_finds_planted_segments(starts: list[int]) -> None:
    q, k, columns = planted(128, starts, 128)
    method = ConvBasis(len(starts), lags=8, scale=1.0)
    basis = method.recover(q, k)
    assert basis.starts.tolist() == [starts]
    for s, start in enumerate(starts):
        assert relative_error(basis.columns[0, s, : 128 - start], columns[s, : 128 - start]) < 1e-12
    v = torch.randn(1, 1, 128, 16, dtype=torch.float64)
    assert relative_error(method(q, k, v), exact(q, k, v, is_causal=True, scale=1.0)) < 1e-10
    assert float(method.residual(q, k)) < 1e-12


def test_conv_basis_tells_when_there_is_none() -> None:
    q, k, _ = qkv(128)
    assert float(ConvBasis(4).residual(q, k).min()) > 0.1
    assert isinstance(ConvBasis(1).applies(4, 5), Refusal)
    with pytest.raises(ConfigError, match="must agree"):
        ConvBasis(1).recover(q, k[:, :, :5])


def summed(n: int, loud: float, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v whose scores are a value a query, one a key and one a lag, and some noise."""
    turn = torch.arange(n).double()[:, None] * torch.rand(4).double()
    ones, weights = torch.ones(n, 1).double(), loud * torch.rand(4).double()
    q = torch.cat([turn.cos(), turn.sin(), ones, torch.randn(n, 1)], -1)
    k = torch.cat([weights * turn.cos(), weights * turn.sin(), loud * torch.randn(n, 1), ones], -1)
    q = q + noise * torch.randn_like(q)
    return q[None, None], k[None, None], torch.randn(1, 1, n, 5).double()


@pytest.mark.parametrize("n", [1, 2, 3, 64, 257])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("loud", [0.5, 4.0, 30.0])
def test_rows_columns_and_lags_are_found(n: int, causal: bool, loud: float) -> None:
    """At any range: what an FFT would lose is computed otherwise."""
    q, k, v = summed(n, loud)
    method = RowColumnToeplitz(is_causal=causal)
    assert relative_error(method(q, k, v), exact(q, k, v, is_causal=causal)) < 1e-8
    assert float(method.residual(q, k)) < 1e-8
    assert abs(certify(method, q, k, v, is_causal=causal).worst_kl) < 1e-8
    q, k, v = (t.float() for t in (q, k, v))
    want = exact(q.double(), k.double(), v.double(), is_causal=causal)
    gap = (method(q, k, v) - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(gap.max()) < 1e-3


def test_early_rows_are_not_lost_beside_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 each is right to its own size, whether rows alone or all are done again."""
    q, k, v = (t.float() for t in summed(2000, 1.0))
    want = exact(q.double(), k.double(), v.double(), is_causal=True)
    for few in (2000, 0):
        monkeypatch.setattr("structc.attention.row_column_toeplitz.FEW", few)
        gap = (RowColumnToeplitz()(q, k, v) - want).norm(dim=-1) / want.norm(dim=-1)
        assert float(gap.max()) < 1e-3 and float(gap[..., :3].max()) < 1e-5


def test_what_is_no_sum_is_told() -> None:
    q, k, v = summed(60, 1.0, noise=0.3)
    method = RowColumnToeplitz()
    told = certify(method, q, k, v, is_causal=True, rows=60)
    eta = float(method.residual(q, k))
    assert 1e-3 < told.worst_tv < 1 and told.worst_kl > 1e-4 and eta > 0.1
    tv = (method.matrix(q, k) - (q @ k.mT * method.sigma(q)).masked_fill(
        torch.ones(60, 60).triu(1).bool(), -math.inf).softmax(-1)).abs().sum(-1) / 2  # fmt: skip
    assert float(tv.max()) <= math.tanh(eta) + 1e-9  # both rows and their shift may be off by eta
    assert isinstance(method.applies(4, 5), Refusal)
    with pytest.raises(ConfigError, match="a square"):
        method(q, k[:, :, :5], v[:, :, :5])


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_faint_rows(causal: bool) -> None:
    q, k, v = (t.requires_grad_() for t in summed(5, 30.0, noise=0.01))
    torch.autograd.gradcheck(RowColumnToeplitz(is_causal=causal), (q, k, v), atol=1e-4)


def test_monarch_is_exact_on_grids() -> None:
    row, column = torch.randn(8, 1, 4).double(), torch.randn(1, 12, 4).double()
    x = torch.cat([row.expand(8, 12, 4), column.expand(8, 12, 4)], -1).reshape(1, 1, 96, 8)
    told = certify(Monarch(12, 1), x, x, x, is_causal=False)
    assert told.worst_kl < 1e-9
    assert certify(Monarch(8, 1), x, x, x, is_causal=False).worst_kl > 1e-3


@pytest.mark.parametrize(
    ("grid", "tiles"), [((8, 12), (2, 3)), ((8, 12), (1, 1)), ((3, 4, 5), (3, 2, 1))]
)
def test_tiles_are_exact_where_rows_and_columns_add_up(
    grid: tuple[int, ...], tiles: tuple[int, ...]
) -> None:
    *frames, h, w = grid
    row, column = torch.randn(h, 1, 4).double(), torch.randn(1, w, 4).double()
    one = torch.cat([row.expand(h, w, 4), column.expand(h, w, 4)], -1)
    x = one.expand(*frames, h, w, 8).reshape(1, 1, -1, 8)
    q, k, v = 2 * x, x, torch.randn(1, 1, x.shape[2], 3).double()
    method = TiledMonarch(grid, tiles, 1)
    told = certify(method, q, k, v, is_causal=False, rows=x.shape[2])
    assert abs(told.worst_kl) < 1e-9 and told.error < 1e-9
    assert certify(method, *qkv(x.shape[2]), is_causal=False).kl > 1e-3


def test_a_tile_is_monarch_and_tiles_of_a_token_are_exact() -> None:
    q, k, v = qkv(25)
    for steps in (1, 3):
        for method, want in (
            (TiledMonarch((4, 6), (4, 6), steps, extra=1), exact(q, k, v)),
            (TiledMonarch((4, 6), (1, 1), steps, extra=1), Monarch(6, steps, extra=1)(q, k, v)),
        ):
            assert relative_error(method(q, k, v), want) < 1e-9
    assert isinstance(TiledMonarch((4, 6), (2, 2)).applies(25, 25), Refusal)
    with pytest.raises(ConfigError, match="has 24"):
        TiledMonarch((4, 6), (2, 2))(q, k, v)


def test_more_steps_are_no_worse() -> None:
    q, k, v = qkv(60)
    kl = [certify(Monarch(6, t), q, k, v, is_causal=False, rows=60).kl for t in (1, 2, 4, 8)]
    assert all(b <= a + 1e-12 for a, b in pairwise(kl))


def test_small_weights_are_uniform() -> None:
    q, k, v = qkv(50)
    told = certify(Uniform(is_causal=True), 0.01 * q, k, v, is_causal=True)
    assert told.worst_tv < 0.01
    assert certify(Uniform(is_causal=True), 5 * q, k, v, is_causal=True).tv > 0.2


@pytest.mark.parametrize(
    ("degree", "bound", "error"),
    [(1, 0.25, 1.56e-2), (2, 0.5, 5.15e-3), (2, 1, 3.97e-2), (3, 1, 5.00e-3), (4, 2, 1.45e-2),
     (4, 4, 2.96e-1), (2, 3, 6.42e-1)],
)  # fmt: skip
def test_minimax_polynomials(degree: int, bound: float, error: float) -> None:
    a, e = minimax(degree, bound)
    x = torch.linspace(-bound, bound, 5000, dtype=torch.float64)
    off = sum(c * x**p for p, c in enumerate(a)) / x.exp() - 1
    assert abs(e / error - 1) < 0.01 and abs(float(off.abs().max()) / e - 1) < 1e-3


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_features_are_the_power_of_a_product(degree: int) -> None:
    x, y = torch.randn(2, 7, 5, dtype=torch.float64).unbind(0)
    chosen, counts = monomials(5, degree)
    weights = torch.tensor(counts, dtype=torch.float64)
    found = (features(x, degree) * weights * features(y, degree)).sum(-1)
    s = (x * y).sum(-1)
    assert torch.allclose(found, sum(s**p for p in range(degree + 1)))
    assert features(x, degree).shape[-1] == len(chosen) == math.comb(5 + degree, degree)


def test_polynomial_bound_holds() -> None:
    q, k, v = qkv(40)
    method = Polynomial(3, 1.0, scale=1.0)
    q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))  # scores within 1
    told = certify(method, q, k, v, is_causal=False, rows=40)
    assert 0 < told.worst_tv <= method.tv_bound() < 0.01
    assert Polynomial(2, 1.0, taylor=True).tv_bound() > Polynomial(2, 1.0).tv_bound()


def test_polynomial_dropout_is_for_training() -> None:
    q, k, v = qkv(20)
    method = Polynomial(2, 1.0, scale=0.1, dropout=0.5)
    with torch.no_grad():
        assert torch.equal(method(q, k, v), method(q, k, v))
    q.requires_grad_()
    assert not torch.equal(method(q, k, v), method(q, k, v))


def test_landmarks_that_are_alike_are_left_out() -> None:
    """Means of keys are nearly one: their inverse would multiply what they get wrong."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 512, 64, generator=generator).unbind(0)
    want = exact(0.1 * q, k, v)
    assert (Nystrom(32)(0.1 * q, k, v) - want).norm() < 0.2 * want.norm()


def test_window_of_all_keys_is_exact() -> None:
    q, k, v = qkv(30)
    want = exact(q, k, v, is_causal=True)
    for method in (WindowSinks(30), BlockSparse(1.0, 8, is_causal=True),
                   SparseLowRank(30, is_causal=True)):  # fmt: skip
        assert relative_error(method(q, k, v), want) < 1e-9


def test_merge_is_a_softmax_over_both() -> None:
    q, k, v = qkv(20, 40)
    parts = [exact(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(25), slice(25, 40))]
    o, lse = merge(*parts[0], *parts[1])
    want, true = exact(q, k, v, return_lse=True)
    assert torch.allclose(o, want) and torch.allclose(lse, true)
    dead = (torch.zeros_like(o), torch.full_like(lse, -math.inf))
    assert torch.allclose(merge(*dead, o, lse)[0], o)
    assert not merge(*dead, *dead)[0].any()


@pytest.mark.parametrize(
    "make",
    [lambda: Monarch(0), lambda: Monarch(4, 0), lambda: Monarch(4, extra=1, is_causal=True),
     lambda: Polynomial(5), lambda: Polynomial(2, 0.0),
     lambda: Polynomial(2, center=True, is_causal=True),
     lambda: BlockSparse(0.0), lambda: BlockSparse(0.5, 16, stride=5), lambda: ConvBasis(0),
     lambda: TiledMonarch((4, 6), (3, 2)), lambda: TiledMonarch((4, 6), (2,)),
     lambda: TiledMonarch((4,), (2,)), lambda: TiledMonarch((4, 6), (2, 2), 0),
     lambda: SparseLowRank(0), lambda: Nystrom(0)],
)  # fmt: skip
def test_mistakes_are_told(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_methods_are_data() -> None:
    assert Monarch(8, 2) == Monarch(8, 2) != Monarch(8, 3)
    assert len({Polynomial(2, 1.0), Polynomial(2, 1.0), Polynomial(3, 1.0)}) == 2
    assert isinstance(Nystrom(50).applies(20, 20), Refusal)


def test_rows_that_are_faint_beside_others() -> None:
    """The largest weight of a head is e^25 times what some rows have."""
    n = 256
    column = torch.where(torch.arange(n) < 100, 0.0, 25.0).double()
    scores = torch.stack([torch.cat([torch.zeros(j), column[: n - j]]) for j in range(n)])
    q, k = torch.eye(n, dtype=torch.float64)[None, None], scores[None, None].double()
    v = torch.randn(1, 1, n, 4, dtype=torch.float64)
    for dtype, limit in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        parts = [t.to(dtype) for t in (q, k, v)]
        y = ConvBasis(1, scale=1.0)(*parts)
        want = exact(*(t.double() for t in parts), is_causal=True, scale=1.0)
        gap = (y.double() - want).norm(dim=-1) / want.norm(dim=-1)
        assert float(gap.max()) < limit


def test_all_of_the_mass_is_every_block() -> None:
    q, k, v = qkv(32)
    k[:, :, 16:] -= 40 * q.mean(2, keepdim=True)
    k[:, :, 20] = 40 * q[:, :, 3]
    assert relative_error(BlockSparse(1.0, 16)(q, k, v), exact(q, k, v)) < 1e-9


@pytest.mark.parametrize("n", [3, 5])
def test_queries_that_are_all_extra(n: int) -> None:
    q, k, v = qkv(n, 10)
    assert relative_error(Monarch(4, extra=5)(q, k, v), exact(q, k, v)) < 1e-9


@pytest.mark.parametrize("name", ["uniform", "uniform causal", "monarch"])
def test_row_sums_are_not_rounded(name: str) -> None:
    q, k, v = (t.to(torch.bfloat16) for t in qkv(300))
    narrow = SAMPLES[name].attend(q, k, v)[1]
    wide = SAMPLES[name].attend(q.float(), k.float(), v.float())[1]
    assert narrow is not None and wide is not None and narrow.dtype == torch.float32
    assert float((narrow - wide).abs().max()) < (0.02 if name == "monarch" else 1e-4)


def test_states_are_added_up() -> None:
    """Not kept for each part of the keys."""
    q, k, v = (torch.randn(2, 8, 512, 16) for _ in range(3))
    with torch.no_grad(), Largest() as seen:
        Polynomial(2, 1.0)(q, k, v)
    assert seen.bytes < 40e6
