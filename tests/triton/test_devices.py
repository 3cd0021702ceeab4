"""Methods whose tensors are not the CPU's: on PyTorch's meta device, which mixes with no other."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from structc import attend
from structc.attention import AbstractMethod
from tests.attention.test_methods import NAMES, SAMPLES

LOOKS = {
    "conv basis": "the search for its segments",
    "row + column + lag": "the search for rows, columns and lags",
    "row + column + lag causal": "the search for rows, columns and lags",
}
"""What decides by values that a meta tensor does not have."""
LENGTHS = {"tiles": 24, "tiles of frames, extra": 13}


class Kernel:
    """Stands for softmax attention on that device."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3]).float()

    def backward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in (q, k, v))


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = ModuleType("kernels_of_no_device")
    module.kernel_of = lambda dtype: Kernel()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(attend.BACKENDS, "meta", module.__name__)
    attend.forget()
    yield
    attend.forget()


def sides(name: str) -> tuple[Tensor, ...]:
    n = LENGTHS.get(name, 60)
    return tuple(torch.empty(1, 2, n, 6, device="meta", requires_grad=True) for _ in range(3))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in LOOKS])
def test_what_a_method_makes_lies_where_q_does(name: str) -> None:
    q, k, v = sides(name)
    y = SAMPLES[name](q, k, v)
    assert y.device.type == "meta" and y.shape == q.shape
    if name.startswith(("monarch", "tiles")) and "causal" not in name:
        return  # their gradient is that of a bias, which the reference computes: it looks at values
    grads = torch.autograd.grad(y.sum(), (q, k, v), allow_unused=True)
    assert all(g is None or g.device.type == "meta" for g in grads) and grads[2] is not None


@pytest.mark.parametrize("name", list(LOOKS))
def test_what_looks_at_values_gets_so_far(name: str) -> None:
    """It fails where it looks, not because tensors of two devices met before."""
    method: AbstractMethod = SAMPLES[name]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        method(*sides(name))
