"""The cost model: deterministic, and monotone in what must cost more."""

from __future__ import annotations

import pytest
import torch

from structc.codegen import peaks as peaks_of
from structc.codegen.cost import predict_ms
from structc.codegen.peaks import Peaks
from structc.forms import Block, PackedDense, Tile
from structc.hardware import Target

F32 = torch.float32


def low_rank(n: int, m: int, r: int) -> Tile:
    return Tile((Block(1, r, n, 1), Block(1, m, r, 1)))


def test_monotone_in_rows_and_size() -> None:
    peaks = Peaks(200.0, 20.0, 400.0)
    by_rows = [predict_ms(PackedDense(384, 384), r, F32, peaks) for r in (1, 16, 256, 4096)]
    by_rank = [predict_ms(low_rank(384, 384, r), 512, F32, peaks) for r in (8, 32, 96, 192)]
    assert by_rows == sorted(by_rows) and by_rank == sorted(by_rank)


def test_half_the_work_is_nearly_half_the_time() -> None:
    dense = predict_ms(PackedDense(384, 1536), 4096, F32)
    half = predict_ms(low_rank(384, 1536, 153), 4096, F32)
    assert 1.6 < dense / half < 2.1


def test_one_row_is_bound_by_weight_bytes() -> None:
    peaks = Peaks(1e9, 10.0, 1e9)
    weights_ms = 4 * 4096 * 4096 / 10e6
    assert predict_ms(PackedDense(4096, 4096), 1, F32, peaks) == pytest.approx(weights_ms, rel=0.01)


def test_default_peaks_know_threads_and_vectors() -> None:
    one = Target("c", ("avx512f", "avx2"), 8, 1, "2")
    assert peaks_of.assumed(Target("c", one.isa, 8, 4, "2")).gflops == 4 * (
        peaks_of.assumed(one).gflops
    )
    assert peaks_of.assumed(Target("c", ("avx2",), 8, 1, "2")).gflops < (
        peaks_of.assumed(one).gflops
    )
