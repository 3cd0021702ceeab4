"""Calibration: the Gram of what really reaches a site, whatever the memory and the spelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import Counter, Experts, Functional, bert, floats, padded, sequential

from structc.errors import CalibrationError
from structc.inputs import to_call
from structc.passes.calibrate import calibrate, centred, split
from structc.passes.capture import capture
from structc.passes.detect import detect
from structc.records import Call, Profile
from structc.workdir import WorkDir


def profile_of(model: nn.Module, data: list[Any], *, memory_mb: int = 512, **more: Any) -> Profile:
    calls = [to_call(d) for d in data]
    captured = capture(model.eval(), calls[0])
    work = more.pop("work", WorkDir(None, {}))
    return calibrate(captured, detect(captured), calls, work=work, memory_mb=memory_mb, **more)


def moments(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    x = rows.detach().reshape(-1, rows.shape[-1]).double().numpy()
    return x.T @ x / len(x), x.mean(0)


def assert_moments(profile: Profile, group: str, rows: Tensor) -> None:
    gram, mean = moments(rows)
    stats = profile.stats[group]
    assert stats.gram.dtype == stats.mean.dtype == torch.float64
    np.testing.assert_allclose(stats.gram.numpy(), gram, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.mean.numpy(), mean, rtol=1e-5, atol=1e-6)
    assert stats.rows == rows.numel() // rows.shape[-1]


def test_gram_is_the_mean_outer_product() -> None:
    model, data = sequential(), [floats(b, 5, 12) for b in (2, 3, 1, 4)]
    profile = profile_of(model, data)
    x = torch.cat([d.reshape(-1, 12) for d in data])
    assert_moments(profile, "0.weight", x)
    with torch.no_grad():
        assert_moments(profile, "2.weight", F.gelu(model[0](x)))
    assert (profile.batches, profile.rows) == (4, 50)


def test_double_precision_stays_double() -> None:
    data = [torch.randn(300, 12, dtype=torch.float64) * 1e3 for _ in range(2)]
    profile = profile_of(sequential().double(), data)
    gram, _ = moments(torch.cat(data))
    np.testing.assert_allclose(profile.stats["0.weight"].gram.numpy(), gram, rtol=1e-13)


def test_half_precision_is_summed_in_more() -> None:
    """Sums of squares beyond 65504 overflow float16; the Gram does not."""
    profile = profile_of(sequential().half(), [(40 * floats(64, 12)).half() for _ in range(2)])
    gram = profile.stats["0.weight"].gram
    assert bool(torch.isfinite(gram).all()) and float(gram.diagonal().mean()) > 1000


def test_functional_sites_see_their_inputs_too() -> None:
    model, data = Functional(), [floats(b, 5, 12) for b in (2, 3)]
    profile = profile_of(model, data)
    x = torch.cat([d.reshape(-1, 12) for d in data])
    with torch.no_grad():
        h = F.gelu(F.linear(x, model.a, model.bias))
        assert_moments(profile, "a", x)
        assert_moments(profile, "b", h)
        assert_moments(profile, "c", h @ model.b)


def test_a_site_used_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.relu(self.layer(x)))

    model, x = Twice(), floats(40, 6)
    with torch.no_grad():
        both = torch.cat([x, F.relu(model.layer(x))])
    assert_moments(profile_of(model, [x]), "layer.weight", both)


def test_a_functional_weight_used_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6) / 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x @ self.w) @ self.w

    model, x = Twice(), floats(40, 6)
    with torch.no_grad():
        both = torch.cat([x, F.relu(x @ model.w)])
    assert_moments(profile_of(model, [x]), "w", both)


def test_a_layer_called_by_keyword_is_seen() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    x = floats(9, 6)
    assert_moments(profile_of(Keyword(), [x]), "layer.weight", x)


def test_padding_does_not_count() -> None:
    model = bert().eval()
    data = [padded(3, 8), padded(2, 6)]
    seen: list[Tensor] = []
    handle = model.encoder.layer[0].intermediate.dense.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0])
    )
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    kept = [x[b["attention_mask"].bool()] for x, b in zip(seen, data)]
    profile = profile_of(model, data)
    assert_moments(profile, "encoder.layer.0.intermediate.dense.weight", torch.cat(kept))


def test_shared_inputs_have_one_matrix() -> None:
    profile = profile_of(bert(), [padded(2, 8)])
    assert sum("attention.self" in group for group in profile.stats) == 1
    assert len(profile.stats) == 5


# ---------------------------------------------------------------------------- what is left out


def test_batches_with_nan_are_dropped_and_said() -> None:
    good = [floats(4, 12), floats(6, 12)]
    bad = floats(5, 12)
    bad[1, 3] = float("nan")
    profile = profile_of(sequential(), [good[0], bad, good[1]])
    assert_moments(profile, "0.weight", torch.cat(good))
    assert profile.batches == 2
    assert any(note.startswith("1 calibration batches") for note in profile.notes)


def test_only_nan_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="all 2 batches"):
        profile_of(sequential(), [torch.full((3, 12), float("inf"))] * 2)


def test_activations_that_overflow_do_not_count() -> None:
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.exp())

    x = floats(6, 4)
    x[2, 1] = 1e4
    profile = profile_of(Overflows(), [x])
    keep = torch.tensor([0, 1, 3, 4, 5])
    assert_moments(profile, "layer.weight", x[keep].exp())
    assert profile.stats["layer.weight"].dropped == 1
    assert any("1 rows" in note for note in profile.notes)


def test_a_batch_that_does_not_fit_names_shapes_and_signature() -> None:
    with pytest.raises(CalibrationError, match=r"float32\[3, 11\]") as caught:
        profile_of(sequential(), [floats(3, 12), floats(3, 11)])
    assert "forward" in caught.value.hint or "input" in caught.value.hint


# ---------------------------------------------------------------------------- memory and resume


def test_little_memory_gives_the_same_matrices(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(400, 400) for _ in range(3)))  # 1.28 MB each
    data = [floats(8, 400), floats(5, 400)]
    progress: list[tuple[str, int, int]] = []
    whole = profile_of(model, data)
    parts = profile_of(model, data, memory_mb=2, progress=lambda *p: progress.append(p))
    assert list(whole.stats) == list(parts.stats) and len(parts.stats) == 3
    for group in whole.stats:
        assert torch.equal(whole.stats[group].gram, parts.stats[group].gram)
        assert torch.equal(whole.stats[group].mean, parts.stats[group].mean)
    assert any("3 passes" in note and "2 MB" in note for note in parts.notes)
    assert progress[-1] == ("calibrate", 6, 6)


def test_finished_matrices_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = sequential(), [floats(4, 12)]
    first = profile_of(model, data, work=WorkDir(tmp_path, {}))

    def never(*_: Any) -> None:
        raise AssertionError("the data were read again")

    monkeypatch.setattr("structc.passes.calibrate.forward", never)
    again = profile_of(model, data, work=WorkDir(tmp_path, {}))
    for group in first.stats:
        assert torch.equal(first.stats[group].gram, again.stats[group].gram)


def test_calibration_moves_no_buffers() -> None:
    model = Counter().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    profile_of(model, [floats(4, 12)] * 3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_centred_moments_are_the_covariance() -> None:
    x = floats(50, 12) + 3
    stats = profile_of(sequential(), [x]).stats["0.weight"]
    want = np.cov(x.double().numpy().T, bias=True)
    np.testing.assert_allclose(centred(stats).gram.numpy(), want, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- splits


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_splits_are_disjoint_and_complete(sizes: list[int]) -> None:
    at, calls = 0, []
    for size in sizes:
        calls.append(Call((torch.arange(at, at + size),), {}))
        at += size
    parts = split(calls)
    items = [
        torch.cat([c.args[0] for c in p]).tolist() for p in (parts.fit, parts.select, parts.verify)
    ]
    assert all(items)
    if parts.notes:
        assert at < 3, "data are shared only where there are too few"
        return
    assert sorted(i for part in items for i in part) == list(range(at))
    held = len(items[1]) + len(items[2])
    if len(sizes) >= 6:
        assert 2 <= len(parts.select) + len(parts.verify) <= max(2, len(sizes) // 3)
    assert held < at


def test_one_batch_is_cut_along_its_first_dimension() -> None:
    parts = split([to_call({"x": floats(12, 3), "flag": True})])
    assert not parts.notes and len(parts.verify) == len(parts.select) == 1
    assert all(c.kwargs["flag"] is True and len(c.kwargs["x"]) < 12 for c in parts.fit)


@pytest.mark.parametrize("memory_mb", [512, 0])
def test_a_layer_that_no_data_reach_has_no_statistics(memory_mb: int) -> None:
    model, data = Experts().eval(), [to_call(floats(5, 12)), to_call(floats(4, 12))]
    captured = capture(model, to_call(floats(5, 12).abs() + 1))
    work = WorkDir(None, {})
    profile = calibrate(captured, detect(captured), data, work=work, memory_mb=memory_mb)
    assert set(profile.stats) == {"first.weight"}
    assert any("1 inputs" in note and "never reached" in note for note in profile.notes)


def test_a_layer_that_only_infinite_rows_reach_is_an_error() -> None:
    class Overflows(Experts):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x / 0)

    with pytest.raises(CalibrationError, match="no finite activation"):
        profile_of(Overflows(), [floats(5, 12)])
