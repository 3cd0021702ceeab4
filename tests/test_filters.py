"""Long depthwise convolutions by FFT: the operator, and their place in a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import structc
from structc.filters import filter_reference
from structc.inputs import to_call
from structc.numerics import relative_error
from structc.passes.capture import capture
from structc.passes.filters import LongFilter, long_filters
from structc.records import Call


@given(
    st.integers(0, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 30),
    st.integers(0, 35), st.booleans(),
)  # fmt: skip
def test_it_is_the_convolution(
    n: int, c: int, length: int, taps: int, padding: int, bias: bool
) -> None:
    if length + 2 * padding < taps:
        return
    x, w = torch.randn(n, c, length).double(), torch.randn(c, 1, taps).double()
    b = torch.randn(c).double() if bias else None
    want = F.conv1d(x, w, b, padding=padding, groups=c)
    y = torch.ops.structc.filter(x, w, b, padding)
    assert y.shape == want.shape and y.is_contiguous()
    assert torch.allclose(y, want, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_and_opcheck(bias: bool) -> None:
    x, w = torch.randn(2, 3, 9).double(), torch.randn(3, 1, 4).double()
    tensors = [x, w, torch.randn(3).double() if bias else None]
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.structc.filter(x, w * 1, b, 2)  # it is changed through .data here
        return y

    assert torch.autograd.gradcheck(run, leaves)
    for grad in (True, False):
        given_ = [None if t is None else t.detach().requires_grad_(grad) for t in tensors]
        torch.library.opcheck(torch.ops.structc.filter.default, (*given_, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_long_signals(dtype: torch.dtype) -> None:
    x, w = torch.randn(3, 8, 5000).to(dtype), (torch.randn(8, 1, 700) / 26).to(dtype)
    want = F.conv1d(x.double(), w.double(), padding=350, groups=8)
    assert relative_error(filter_reference(x, w, None, 350), want) < 4 * torch.finfo(dtype).eps
    w.mul_(2)  # no spectrum is stale
    assert relative_error(filter_reference(x, w, None, 350), 2 * want) < 4 * torch.finfo(dtype).eps


class Mixer(nn.Module):
    """A long convolution a channel, a short one, and layers around them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Conv1d(4, 16, 1), nn.Linear(16, 3)
        self.long = nn.Conv1d(16, 16, 1024, padding=1023, groups=16)
        self.short = nn.Conv1d(16, 16, 5, padding=2, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.long(self.inner(x))[..., : x.shape[-1]]
        return self.outer(torch.relu(self.short(y)).mT)


def test_models_take_them_where_operations_are_saved(tmp_path) -> None:
    model, x = Mixer().eval(), torch.randn(2, 4, 2048)
    fast = structc.compile(model, x, effort="none")
    assert type(fast.long) is LongFilter and type(fast.short) is nn.Conv1d
    assert fast.long.weight is model.long.weight and type(model.long) is nn.Conv1d
    assert relative_error(fast(x), model(x)) < 1e-5
    other = torch.randn(3, 4, 1500)
    assert relative_error(fast(other), model(other)) < 1e-5
    assert any("run by FFT" in note for note in fast.report.to_dict()["notes"])
    fast.save(tmp_path / "out")
    again = structc.load(tmp_path / "out", Mixer())
    assert type(again.long) is LongFilter and torch.equal(again(x), fast(x))
    graph = capture(model, to_call(x)).regions[0].graph.code
    assert "structc.filter" in graph and graph.count("aten.conv1d") == 2


def test_only_faster_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from structc.passes import filters

    model, x = Mixer().eval(), torch.randn(2, 16, 512)
    calls = {"long": Call((x,), {}), "short": Call((x,), {})}
    for times, taken in (((1.0, 0.7), {"long"}), ((1.0, 0.9), set())):
        monkeypatch.setattr(filters, "_times", lambda *_, t=times: t)
        assert set(long_filters(model, calls, timed=True)) == taken
    monkeypatch.setattr(filters, "_agree", lambda *_: False)
    monkeypatch.setattr(filters, "_times", lambda *_: (1.0, 0.1))
    assert not long_filters(model, calls, timed=True)


def test_broken_artifacts_are_refused(tmp_path) -> None:
    import json

    model, x = Mixer().eval(), torch.randn(2, 4, 2048)
    structc.compile(model, x, effort="none").save(tmp_path / "out")
    file = tmp_path / "out" / "structc.json"
    manifest = json.loads(file.read_text())
    manifest["filters"] = ["outer"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(structc.ArtifactCorrupt):
        structc.load(tmp_path / "out", Mixer())


def test_wrong_filters_do_not_survive_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """References are those of the user's own layers, and what fails is taken back."""
    from structc import filters as operator
    from structc.passes import filters

    model, x = Mixer().eval(), torch.randn(2, 4, 2048)
    monkeypatch.setattr(filters, "_agree", lambda *_: True)
    wrong = lambda *a: filter_reference(*a).roll(1, -1)  # noqa: E731
    monkeypatch.setattr(operator, "filter_reference", wrong)
    fast = structc.compile(model, x, effort="none")
    assert type(fast.long) is nn.Conv1d
    assert relative_error(fast(x), model(x)) < 1e-5
    notes = fast.report.to_dict()["notes"]
    assert not any("run by FFT" in note for note in notes)


def test_wrong_filters_do_not_cost_the_layers_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from structc import filters as operator
    from structc.passes import filters

    long = nn.Conv1d(4, 4, 1025, padding=512, groups=4)
    model, x = nn.Sequential(long, nn.Linear(2048, 256)).eval(), torch.randn(2, 4, 2048)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(256, 6) @ torch.randn(6, 2048) / 100)
    monkeypatch.setattr(filters, "_agree", lambda *_: True)
    wrong = lambda *a: filter_reference(*a).roll(1, -1)  # noqa: E731
    monkeypatch.setattr(operator, "filter_reference", wrong)
    budget, config = structc.Budget(error=0.1), {"1": "low_rank"}
    fast = structc.compile(model, x, effort="none", budget=budget, config=config)
    report = fast.report.to_dict()
    assert fast.plan.choices["1"].family == "low_rank" and not report["sites"][0]["rolled_back"]
    assert any("do not agree with the model" in note for note in report["notes"])


def test_the_baseline_is_the_model_with_its_own_convolutions() -> None:
    captured = capture(Mixer().eval(), to_call(torch.randn(2, 4, 2048)))
    assert set(captured.filters) == {"long"} and type(captured.tree.long) is nn.Conv1d
