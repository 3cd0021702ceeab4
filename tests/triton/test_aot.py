"""Every kernel compiles for every target without a GPU: no spills, matrix instructions, in time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from structc.codegen.triton import aot, conv_basis, load, monarch, polynomial, sparse_polynomial
from structc.codegen.triton.aot import Job
from structc.codegen.triton.attention import KERNELS
from structc.codegen.triton.attention_table import CASES
from structc.codegen.triton.config import PRODUCTS
from structc.codegen.triton.emit import WAYS
from structc.codegen.triton.entry import Entry
from structc.codegen.triton.table import Case, entries, table, wanted
from structc.codegen.triton.targets import TARGETS, target_of
from structc.codegen.triton.tile import DTYPES
from structc.errors import ConfigError
from structc.records import Refusal

METHODS = tuple(
    kernel.name
    for kernel in (
        conv_basis.KERNEL, sparse_polynomial.KERNEL, *monarch.KERNELS, *polynomial.KERNELS
    )
)  # fmt: skip


@functools.cache
def defaults() -> list[dict[str, Any]]:
    """The default configs in bfloat16, compiled: every kernel, attention in some of its forms."""
    left = list(CASES)[1:2] + list(CASES)[3:] + list(polynomial.CASES)[1:]
    every = wanted([torch.bfloat16], list(TARGETS), every=False)
    return table([e for e in every if e.case not in left])


@pytest.mark.parametrize("target", TARGETS)
def test_defaults(target: str) -> None:
    mine = [row for row in defaults() if row["target"] == target]
    every = {name for ways in WAYS.values() for name in ways} | {"norm", *METHODS, *KERNELS}
    limits = target_of(target)
    assert {row["kernel"] for row in mine} == every - (set() if limits.orders else {"chain"})
    for row in mine:
        assert row["status"] == "ok" and row["default"], row
        assert row["spilled_bytes"] == 0 and row["shared_bytes"] <= limits.shared, row
        assert 0 < row["registers"] <= limits.registers, row
        product = row["kernel"] in (*PRODUCTS, "split", "batch", *METHODS, *KERNELS)
        assert bool(row["matrix_instructions"]) == product, row
        assert row["wide_loads"] or row["kernel"] == "shuffle", row


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_no_default_spills(dtype: torch.dtype) -> None:
    for row in table(wanted([dtype], list(TARGETS), every=False)):
        assert row["status"] == "ok", row
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= target_of(row["target"]).shared, row


FEW = 8
"""Configs of each kernel that are compiled, besides its defaults."""


def some_of(every: Sequence[Entry]) -> list[Entry]:
    """Of each kernel and target the defaults, and others evenly from all of its cases."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in every:
        groups.setdefault((entry.kind, entry.job.target), []).append(entry)
    found = []
    for group in groups.values():
        others = [e for e in group if not e.chosen]
        step = max(1, len(others) // FEW)
        found += [e for e in group if e.chosen] + others[::step][:FEW]
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_many_configs(dtype: torch.dtype) -> None:
    rows = table(some_of(wanted([dtype], list(TARGETS), every=True)))
    limits = {name: target.shared for name, target in TARGETS.items()}
    compiled = [r for r in rows if r["status"] == "ok"]
    failed = [r for r in rows if r["status"] != "ok" and "shared memory" not in r["status"]]
    assert not failed and len(compiled) > len(rows) / 2
    if dtype == torch.bfloat16:
        chosen = [r for r in compiled if r["default"]]
        assert all(r["shared_bytes"] <= limits[r["target"]] for r in chosen)
        assert not any(r["spilled_bytes"] for r in chosen)


def test_what_does_not_compile_says_why() -> None:
    case = Case("one", "block(1,64,64,1)")
    found = entries(case, torch.bfloat16, ["cuda:90"], every=False)
    assert not isinstance(found, Refusal)
    job = found[0].job
    odd = Job(**{**vars(job), "sizes": {**job.sizes, "BM": 24}})  # no power of two
    unknown = Job(**{**vars(job), "function": "nothing"})
    made, other = aot.compiled([odd, unknown])
    assert "power" in made.status and "nothing" in other.status


@pytest.mark.parametrize(
    ("found", "told"), [((3, 9), ""), (None, ""), ((4, 0), "Triton 4.0 is outside")]
)
def test_versions_that_nobody_tested(
    found: tuple[int, int] | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "version", lambda: found)
    assert load.untested().startswith(told) and bool(load.untested()) == bool(told)


def test_a_module_that_fails_is_not_kept() -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load.module_of("half = 1\n1 / 0\n")


def test_targets_by_name() -> None:
    assert target_of("hip:gfx942").warp == 64
    with pytest.raises(ConfigError, match="cuda:75"):
        target_of("cuda:75")
