"""The benchmark for those who have a GPU, on small shapes under the interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples import bench_gpu
from structc import attend, ops
from structc.attention import kernels
from structc.codegen.triton import attempt
from structc.codegen.triton.tile import TritonTile


@pytest.fixture(autouse=True)
def no_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "_failures", [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everything_is_right(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dict(ops.BACKENDS), dict(attend.BACKENDS), dict(kernels.BACKENDS)
    assert bench_gpu.main(["--dtype", dtype, "--json", str(tmp_path / "gpu.json")]) == 0
    assert before == (ops.BACKENDS, attend.BACKENDS, kernels.BACKENDS)
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["passed"] and not data["failures"] and len(data["rows"]) == 20
    assert all(0 <= row["error"] < bench_gpu.TOLERANCE[dtype] for row in data["rows"])
    assert not any(row["times"] for row in data["rows"])  # nothing was timed
    text = capsys.readouterr().out
    assert "nothing is timed" in text and "WRONG" not in text


def test_a_wrong_kernel_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = TritonTile.__call__

    def wrong(self: TritonTile, *args: Any) -> Tensor:
        return 1.01 * run(self, *args)

    monkeypatch.setattr(TritonTile, "__call__", wrong)
    assert bench_gpu.main(["--dtype", "float32", "--only", "tile"]) == 1
    told = capsys.readouterr()
    assert "WRONG" in told.out and "no speedups" in told.err


def test_no_speedup_beside_a_red_gate() -> None:
    row = bench_gpu.Row("one", 0.0, True, {"structc": 2.0, "dense": 5.0})
    assert "dense 2.50x" in bench_gpu.table([row], gate=True)
    assert "x" not in bench_gpu.table([row], gate=False).splitlines()[1]


def test_a_kernel_that_does_not_run_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: TritonTile, *args: Any) -> Tensor:
        raise RuntimeError("no room")

    monkeypatch.setattr(TritonTile, "__call__", broken)
    assert bench_gpu.main(["--dtype", "float32", "--only", "tile"]) == 1  # the reference is right
    assert "did not run" in capsys.readouterr().out


def test_a_converted_model(tmp_path: Path) -> None:
    import structc

    file = tmp_path / "model.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\ndef make():\n    torch.manual_seed(0)\n"
        "    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()\n"
        "    return net, torch.randn(5, 64)\n"
    )
    scope: dict[str, Any] = {}
    exec(file.read_text(), scope)
    net, x = scope["make"]()
    config = {"_default": {"family": "monarch", "in_blocks": 4, "out_blocks": 4, "rank": 2}}
    budget = structc.Budget(error=0.99)
    fast = structc.compile(net, x, config=config, budget=budget, effort="none")
    fast.save(tmp_path / "out")
    calls = ops.call_count()
    given = ["--dtype", "float32", "--only", "model", "--model", f"{file}:make"]
    assert bench_gpu.main([*given, "--artifact", str(tmp_path / "out")]) == 0
    assert ops.call_count() > calls


def test_arguments_that_belong_together() -> None:
    with pytest.raises(SystemExit):
        bench_gpu.main(["--model", "model.py:make"])
    assert not torch.cuda.is_available()
