"""What the output feels: the Gram of gradients, and fits that weigh outputs by it."""

from __future__ import annotations

import gc
import operator
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import Functional, bert, floats, padded, sequential

from structc.inputs import to_call
from structc.numerics import regularised, weighted_error
from structc.passes import curvature, objective
from structc.passes.calibrate import calibrate, centred
from structc.passes.capture import capture
from structc.passes.curvature import DAMPING, output_grams
from structc.passes.detect import detect
from structc.passes.objective import Objective, Objectives
from structc.records import LinearSite, Profile, Refusal
from structc.workdir import WorkDir


def grams(
    model: nn.Module, data: list[Any], memory_mb: float = 64.0, path: Path | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    torch.manual_seed(0)
    calls = [to_call(d) for d in data]
    captured = capture(model.eval(), calls[0])
    work = WorkDir(path, {})
    return output_grams(captured, detect(captured), calls, work=work, memory_mb=memory_mb)


class Two(nn.Module):
    """y = B tanh(A x): the derivative by A's output is B diag(1 - tanh^2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_it_is_the_jacobian_with_itself() -> None:
    model, data = Two(), [floats(64, 6) for _ in range(150)]
    found, notes = grams(model, data)
    assert not notes
    with torch.no_grad():
        slope = 1 - torch.tanh(model.a(data[0])) ** 2
        jacobian = model.b.weight[None] * slope[:, None, :]
        expected = torch.einsum("noi,noj->ij", jacobian, jacobian).double() / len(slope)
        expected /= model(data[0]).double().norm() ** 2
        expected += DAMPING * expected.diagonal().mean() * torch.eye(5)
    assert found["a"].dtype == torch.float64
    torch.testing.assert_close(found["a"], expected, rtol=0.1, atol=0.03 * float(expected.max()))
    whole = found["b"] / found["b"].diagonal().mean()
    torch.testing.assert_close(whole, torch.eye(4).double(), rtol=0.1, atol=0.1)


def test_padding_is_not_felt() -> None:
    model, call = bert(), padded(3, 7)
    found, _ = grams(model, [call])
    other = dict(call)
    other["input_ids"] = torch.where(call["attention_mask"] > 0, call["input_ids"], 5)
    again, _ = grams(model, [other])
    assert found.keys() == again.keys() and found
    for name in found:
        torch.testing.assert_close(found[name], again[name], rtol=1e-4, atol=1e-9)


def test_gradients_leave_no_trace() -> None:
    model = bert()
    flags = [p.requires_grad for p in model.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen, _ = grams(model, [padded(3, 7)])
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    free, _ = grams(model, [padded(3, 7)])
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())
    for name, gram in frozen.items():
        torch.testing.assert_close(free[name], gram, rtol=1e-3, atol=1e-9)


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).detach()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_model_that_cannot_be_differentiated_says_so() -> None:
    found, notes = grams(Cut(), [floats(5, 4)])
    assert not found and "could not be measured" in notes[0]
    found, notes = grams(InPlace(), [floats(5, 4)])
    assert set(found) == {"net.0", "net.2"} and not notes


def test_weights_without_a_layer_have_none() -> None:
    found, _ = grams(Functional(), [floats(5, 12)])
    assert not found


def test_memory_is_bounded_and_said() -> None:
    found, notes = grams(sequential(), [floats(5, 5, 12)], memory_mb=1e-9)
    assert not found and "MB are allowed" in notes[0]


def test_it_is_kept_for_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = grams(Two(), [floats(8, 6)], path=tmp_path)
    monkeypatch.setattr(curvature, "_measure", lambda *_: pytest.fail("measured again"))
    second, _ = grams(Two(), [floats(8, 6)], path=tmp_path)
    assert all(torch.equal(first[n], second[n]) for n in first)


# ---------------------------------------------------------------------------- the objective


def planted(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(m + n)

    def steep(size: int) -> Tensor:
        a = torch.randn(size, size, generator=g, dtype=torch.float64)
        q, _ = torch.linalg.qr(a)
        return q * torch.logspace(0, -4, size, dtype=torch.float64) @ q.T

    return torch.randn(m, n, generator=g, dtype=torch.float64), steep(n), steep(m)


def test_low_rank_is_the_minimum_in_both_metrics() -> None:
    weight, gram, out = planted(24, 16)
    objective = Objective(weight, gram, out)
    module = objective.fit("low_rank", {"rank": 5})
    assert not isinstance(module, Refusal)
    root_g, root_c = _root(out), _root(gram)
    s = torch.linalg.svdvals(root_g @ weight @ root_c)
    best = float((s[5:] ** 2).sum().sqrt() / (s**2).sum().sqrt())
    assert objective.error(module) == pytest.approx(best, rel=1e-6)
    assert objective.low_rank_errors([5]) == pytest.approx([best], rel=1e-6)
    blind = Objective(weight, gram, None).fit("low_rank", {"rank": 5})
    assert not isinstance(blind, Refusal)
    assert objective.error(module) < objective.error(blind)


def test_monarch_gains_from_knowing_its_outputs() -> None:
    weight, gram, out = planted(24, 16)
    out = torch.block_diag(*(out[i : i + 12, i : i + 12] for i in (0, 12)))
    hyper = {"in_blocks": 2, "out_blocks": 2, "rank": 3}
    objective = Objective(weight, gram, out)
    aware = objective.fit("monarch", hyper)
    blind = Objective(weight, gram, None).fit("monarch", hyper)
    assert not isinstance(aware, Refusal) and not isinstance(blind, Refusal)
    assert objective.error(aware) < objective.error(blind)
    assert aware.factors()[0].dtype == weight.dtype


def test_refusals_stay_refusals() -> None:
    weight, gram, out = planted(24, 16)
    objective = Objective(weight, gram, out)
    grid = objective.fit("monarch", {"in_blocks": 2, "out_blocks": 5, "rank": 1})
    assert isinstance(grid, Refusal) and grid.code == "GRID"
    weight[0, 0] = float("nan")
    broken = Objective(weight, gram, out).fit("low_rank", {"rank": 2})
    assert isinstance(broken, Refusal) and broken.code == "NONFINITE"


def test_the_error_is_of_the_weighted_output() -> None:
    weight, gram, out = planted(6, 5)
    other = weight + 0.1 * torch.randn(6, 5, dtype=torch.float64)
    x = _root(gram)
    gap, whole = (_root(out) @ a @ x for a in (weight - other, weight))
    expected = float(gap.norm() / whole.norm())
    assert weighted_error(weight, other, gram, out) == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------------------- all objectives


class Shared(nn.Module):
    """Twenty layers in two groups of one input each; every second one has a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        first = (nn.Linear(12, 12, bias=bool(i % 2)) for i in range(10))
        second = (nn.Linear(12, 12, bias=bool(i % 2)) for i in range(10))
        self.first, self.second = nn.ModuleList(first), nn.ModuleList(second)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(sum(layer(x) for layer in self.first))
        return sum(layer(y) for layer in self.second)


def objectives_of(
    model: nn.Module, memory_mb: int = 64
) -> tuple[Objectives, list[LinearSite], Profile]:
    calls, work = [to_call(floats(30, 12))], WorkDir(None, {})
    captured = capture(model.eval(), calls[0])
    sites = detect(captured)
    profile = calibrate(captured, sites, calls, work=work, memory_mb=memory_mb)
    felt, _ = output_grams(captured, sites, calls, work=work, memory_mb=64)
    profile = Profile(profile.stats, profile.batches, profile.rows, profile.notes, felt)
    return Objectives(captured, profile), list(sites.linear), profile


def test_sites_of_one_group_share_their_gram() -> None:
    objectives, sites, profile = objectives_of(Shared())
    made = {s.name: objectives.of(s) for s in sites}
    assert len(made) == 20 and len({id(o.gram) for o in made.values()}) == 4
    for site in sites:
        stats = profile.stats[site.group]
        expected = regularised((centred(stats) if site.bias else stats).gram)
        assert torch.equal(made[site.name].gram, expected)
    assert objectives.of(sites[-1]) is made[sites[-1].name]


def test_objectives_are_let_go() -> None:
    objectives, sites, _ = objectives_of(Shared())
    alive = [weakref.ref(objectives.of(site)) for site in sites]
    grams = [weakref.ref(objectives.of(site).gram) for site in sites[-1:]]
    gc.collect()
    kept = [r() is not None for r in alive]
    assert kept == [False] * (len(sites) - objective.KEPT) + [True] * objective.KEPT
    again = objectives.of(sites[0])
    assert torch.equal(again.weight, operator.attrgetter(sites[0].weight)(objectives.captured.tree))
    assert grams[0]() is not None
    objectives._kept.clear()
    del again
    gc.collect()
    assert grams[0]() is None and not objectives._grams


def test_objectives_stay_inside_their_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "SHARE", 1e6 / (8 * 12**2 * 8))  # of 1 MB: eight matrices
    monkeypatch.setenv("STRUCTC_MEMORY_MB", "1")
    objectives, sites, _ = objectives_of(Shared())
    for site in sites:
        assert objectives.of(site).root_bytes == 2 * 12**2 * 8
    assert list(objectives._kept) == [s.name for s in sites[-3:]]  # six for roots, two for inputs
    monkeypatch.setattr(objectives, "_limit", 0)
    assert objectives.of(sites[0]) and list(objectives._kept) == [sites[0].name]


def test_threads_get_the_same_objectives() -> None:
    objectives, sites, _ = objectives_of(Shared())
    wanted = sites[:8] * 40
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(objectives.of, wanted))
    assert len({id(o) for o in made}) == 8 and len({id(o.gram) for o in made}) <= 4
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(objectives.of, sites * 20))
    assert len(many) == 400 and len(objectives._kept) == objective.KEPT


def test_spilled_matrices_leave_the_disk_with_their_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = nn.Sequential(*(nn.Linear(400, 400) for _ in range(3)))
    calls = [to_call(floats(8, 400))]
    captured = capture(model.eval(), calls[0])
    sites, work = detect(captured), WorkDir(None, {})
    profile = calibrate(captured, sites, calls, work=work, memory_mb=2)
    assert [p.name[:8] for p in tmp_path.iterdir()] == ["structc-"]
    stats = profile.stats
    del profile
    gc.collect()
    assert all(stats[s.group].rows == 8 for s in sites.linear)
    del stats
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("structc.passes.calibrate._keep", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(captured, sites, calls, work=work, memory_mb=2)
    assert list(tmp_path.iterdir()) == []


def _root(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
