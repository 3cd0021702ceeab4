"""Exact structure in the weights of a model: found, rewritten, verified, saved; or left alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import structc
from structc.families import Circulant, LowRank, Product
from structc.inputs import to_call
from structc.numerics import relative_error
from structc.passes.capture import capture
from structc.passes.detect import detect
from structc.passes.exact import recognised
from structc.passes.windows import Windowed
from structc.records import Window

N = 64


def cosines(n: int = N) -> Tensor:
    at = torch.arange(n, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(n, generator=g) for _ in range(2))
    return torch.cos(math.pi / n * at[:, None] * (at + 0.5))[rows][:, columns]


def stft(size: int = 32) -> Tensor:
    """A windowed real DFT as the weight of a convolution, (2 (size // 2 + 1), 1, size)."""
    spectrum = torch.fft.rfft(torch.eye(size, dtype=torch.float64)).T
    window = torch.hann_window(size, dtype=torch.float64)
    return (torch.cat([spectrum.real, spectrum.imag]) * window)[:, None]


class Planted(nn.Module):
    """A circulant layer, a scrambled cosine transform, a low-rank layer, and one of noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.ring, self.dct = nn.Linear(N, N), nn.Linear(N, N, bias=False)
        self.thin, self.noise = nn.Linear(N, 48), nn.Linear(48, 8)
        at = torch.arange(N)
        with torch.no_grad():
            self.ring.weight.copy_(torch.randn(N)[(at[:, None] - at) % N] / 8)
            self.dct.weight.copy_(cosines() / 8)
            self.thin.weight.copy_(torch.randn(48, 3) @ torch.randn(3, N) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(torch.relu(self.thin(torch.relu(self.dct(torch.relu(self.ring(x)))))))


class Spectrogram(nn.Module):
    """An STFT written as a convolution, then layers of noise, one of them a patch embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.front = nn.Conv1d(1, 34, 32, stride=16)
        self.mix = nn.Conv1d(34, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, groups=8)
        with torch.no_grad():
            self.front.weight.copy_(stft())

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(torch.relu(self.mix(self.front(x).abs())))


def known_of(model: nn.Module, x: Tensor):
    captured = capture(model, to_call(x))
    sites = detect(captured)
    return sites, recognised(captured, sites, lambda *_: None)


def test_weights_of_layers_are_recognised() -> None:
    _, known = known_of(Planted().eval(), torch.randn(5, N))
    assert {name: r.name for name, r in known.items()} == {
        "ring": "circulant",
        "dct": "permuted dct2",
        "thin": "low_rank",
    }
    assert isinstance(known["ring"].family, Circulant)
    assert isinstance(known["thin"].family, LowRank)
    assert isinstance(known["dct"].family, Product)


def test_the_exact_tier_takes_them() -> None:
    model, x = Planted().eval(), torch.randn(96, N)
    fast = structc.compile(model, x, effort="none")
    choices = {name: c.family for name, c in fast.plan.choices.items()}
    assert choices["thin"] == "low_rank" and choices["noise"] == "dense"
    assert relative_error(fast(x), model(x)) < 1e-5
    report = fast.report.to_dict()
    assert any("circulant" in note for note in report["notes"]), report["notes"]
    rows = {s["name"]: s for s in report["sites"]}
    (exact,) = [c for c in rows["thin"]["candidates"] if c["family"] == "low_rank"]
    assert exact["exact"] and exact["error"] < 1e-6  # rounding, and said to be that
    assert rows["thin"]["exact"] == (rows["thin"]["choice"]["family"] == "low_rank")


@pytest.mark.parametrize("asked", ["circulant", {"family": "circulant"}])
def test_a_forced_family_is_the_recognised_structure_where_the_weight_has_it(asked) -> None:
    model, x = Planted().eval(), torch.randn(96, N)
    fast = structc.compile(
        model, x, budget=structc.Budget(error=0.5), config={"ring": asked}, effort="none"
    )
    rows = {s["name"]: s for s in fast.report.to_dict()["sites"]}
    (exact,) = [c for c in rows["ring"]["candidates"] if c["family"] == "circulant"]
    assert exact["exact"]


def test_inspect_says_what_is_exact() -> None:
    rows = structc.inspect(Planted().eval(), torch.randn(96, N)).to_dict()["sites"]
    exact = {(r["name"], c["family"]) for r in rows for c in r["candidates"] if c["exact"]}
    assert {("ring", "circulant"), ("thin", "low_rank")} <= exact
    assert ("noise", "low_rank") not in exact


@pytest.mark.parametrize("runner", ["modules", "graph"])
def test_rewritten_models_compute_the_same(monkeypatch, runner) -> None:
    """Whatever is faster here: every structure is put in place, in the tree and in the graph."""
    from structc.passes.fit import materialise
    from structc.passes.objective import Objectives
    from structc.passes.rewrite import rewrite

    for model, x in ((Planted(), torch.randn(7, N)), (Spectrogram(), torch.randn(3, 1, 200))):
        model.eval()
        captured = capture(model, to_call(x))
        sites = detect(captured)
        found = recognised(captured, sites, lambda *_: None)
        families = {name: r.family for name, r in found.items()}
        every = [*sites.linear, *sites.convolutions]
        sites = structc.records.Sites(tuple(s for s in every if s.name in found), (), ())
        objectives = Objectives(captured, None, families)
        modules = {
            s.name: materialise(objectives, s, families[s.name].name, families[s.name].hyper())
            for s in sites.linear
        }
        assert modules
        product = rewrite(captured, sites, modules)
        ran = []
        for r in product.runners:
            r.active = runner == "graph"
            monkeypatch.setattr(r, "run", lambda *a, f=r.run, s=ran: s.append(f(*a)) or s[-1])
        with torch.no_grad():
            for given in (x, torch.cat([x, x, x])):
                assert relative_error(product.tree(given), model(given)) < 1e-5
        assert not any(m.training for m in product.tree.modules())
        if runner == "graph":
            assert len(ran) == 2 and all(isinstance(y, Tensor) for y in ran)
            code = product.runners[0].region.graph.code
            assert "structc.tile" in code and "front_weight" not in code


def test_products_are_saved_and_loaded(tmp_path) -> None:
    model, x = Planted().eval(), torch.randn(96, N)
    config = {"ring": None}
    fast = structc.compile(model, x, effort="none", config=config)
    fast.save(tmp_path / "out")
    again = structc.load(tmp_path / "out", Planted())
    assert torch.equal(again(x), fast(x))


def test_convolutions_are_maps_of_their_windows() -> None:
    sites, known = known_of(Spectrogram().eval(), torch.randn(3, 1, 200))
    assert {s.name for s in sites.convolutions} == {"front", "mix"}
    front = next(s for s in sites.convolutions if s.name == "front")
    assert front.window == Window((32,), (16,), (0,))
    assert (front.in_features, front.out_features, front.rows) == (32, 34, 33)
    assert any(r.site == "grouped" and r.code == "GROUPS" for r in sites.refusals)
    assert set(known) == {"front"} and known["front"].name == "rdft"


def test_convolutions_in_the_pipeline(tmp_path) -> None:
    model, x = Spectrogram().eval(), torch.randn(64, 1, 4000)
    fast = structc.compile(model, x, effort="none")
    assert relative_error(fast(x), model(x)) < 1e-5
    report = fast.report.to_dict()
    assert {r["site"] for r in report["refusals"] if r["code"] == "NO_STRUCTURE"} == {"mix"}
    assert "front" in fast.plan.choices and "mix" not in fast.plan.choices
    fast.save(tmp_path / "out")
    again = structc.load(tmp_path / "out", Spectrogram())
    assert torch.equal(again(x), fast(x))
    ignored = structc.compile(model, x, effort="none", ignore=["front"])
    assert "front" not in ignored.plan.choices


def test_low_rank_convolutions_and_slower_ones_stay(monkeypatch) -> None:
    from structc.passes import exact

    model = Spectrogram().eval()
    with torch.no_grad():
        model.mix.weight.copy_((torch.randn(8, 1) @ torch.randn(1, 102)).unflatten(1, (34, 3)))
    x = torch.randn(3, 1, 200)
    assert set(known_of(model, x)[1]) == {"front"}
    captured = capture(model, to_call(x))
    for times, taken in (((1.0, 0.5), {"front"}), ((1.0, 0.95), set())):
        monkeypatch.setattr(exact, "ahead", lambda *_, t=times: t)
        found = recognised(captured, detect(captured), lambda *_: None, timed=True)
        assert set(found) == taken


class Twice(nn.Module):
    """The weight of a convolution used with a stride of its own, too."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(1, 34, 32, stride=16, bias=False)
        self.front.weight.data.copy_(stft())

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(x, self.front.weight, stride=8)


def test_a_weight_that_is_used_otherwise_is_left_alone() -> None:
    sites, _ = known_of(Twice().eval(), torch.randn(2, 1, 200))
    assert not sites.convolutions
    assert any(r.site == "front" and r.code == "MIXED" for r in sites.refusals)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("padding", [0, 2])
def test_windows_are_what_a_convolution_sees(dims: int, padding: int) -> None:
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    conv = kind(3, 5, (4, 3)[:dims], stride=(2, 3)[:dims], padding=padding).double()
    sizes = (17, 14)[:dims]
    family = structc.families.Dense(conv.weight.detach().flatten(1))
    family.bias = conv.bias
    window = Window(tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.padding))
    windowed = Windowed(family, window)
    assert torch.equal(windowed.weight, conv.weight) and windowed.bias is conv.bias
    for x in (torch.randn(2, 3, *sizes).double(), torch.randn(3, *sizes).double()):
        y = windowed(x)
        assert y.is_contiguous() and torch.allclose(y, conv(x), atol=1e-12)
