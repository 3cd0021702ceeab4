"""Configs that compiled code says no to: registers that spill, too much shared memory.

``spilled.json`` is data, by target, dtype and kind of kernel. Compiling tells what no estimate of
registers does; defaults are chosen without these. After a change of a kernel or of Triton
``python -m structc.codegen.triton.spilled`` compiles all defaults, adds those that spill, and goes
on with the next ones until none does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from structc.codegen.triton.config import Config

PATH = Path(__file__).with_name("spilled.json")
Found = dict[str, dict[str, dict[str, list[str]]]]


@functools.cache
def _table() -> Found:
    found: Found = json.loads(PATH.read_text()) if PATH.exists() else {}
    return found


def spills(key: str, config: Config, dtype: str, target: str) -> bool:
    """Whether a config is known to spill.

    Args:
        key: kind of a stage, or a kernel with the width of a head: ``"monarch_left 64"``.
        config: its config.
        dtype: ``"bf16"``, ``"fp16"``, ``"fp32"``, or ``"tf32"``, which counts as that.
        target: name of a GPU.
    """
    dtype = "fp32" if dtype == "tf32" else dtype
    return str(config) in _table().get(target, {}).get(dtype, {}).get(key, ())


def usable(
    kernel: str, width: int, configs: Sequence[Config], dtype: str, target: str
) -> list[Config]:
    """Configs in their order; those that are known to spill at the end, the last ones first: they
    are the smallest.

    A width that nobody compiled counts as the next one that somebody did, or as the widest.

    >>> some = [Config(64, 64, 1, 4, 2), Config(32, 32, 1, 4, 2)]
    >>> usable("no_kernel", 64, some, "bf16", "cuda:90") == some
    True
    """
    known = _table().get(target, {}).get(dtype, {})
    widths = sorted(int(k.rsplit(" ", 1)[1]) for k in known if k.rsplit(" ", 1)[0] == kernel)
    own = next((w for w in widths if w >= width), max(widths, default=width))
    bad = [c for c in configs if spills(f"{kernel} {own}", c, dtype, target)]
    return [*(c for c in configs if c not in bad), *bad[::-1]]


def learn() -> None:
    """Compile defaults and write down what spills, until no default does."""
    from structc.codegen.triton.table import table, wanted
    from structc.codegen.triton.targets import TARGETS
    from structc.codegen.triton.tile import DTYPES

    seen: set[Any] = set()
    while True:
        every = wanted(list(DTYPES), list(TARGETS), every=False)
        left = [
            e for e in every if (e.key, e.config, e.job.dtype, e.job.target, e.case) not in seen
        ]
        bad = 0
        for entry, row in zip(left, table(left, progress=lambda *at: print(*at)), strict=True):
            seen.add((entry.key, entry.config, entry.job.dtype, entry.job.target, entry.case))
            limit = TARGETS[entry.job.target].shared
            if row["status"] == "ok" and not row["spilled_bytes"] and row["shared_bytes"] <= limit:
                continue
            kinds = _table().setdefault(entry.job.target, {}).setdefault(entry.job.dtype, {})
            known = kinds.setdefault(entry.key, [])
            if str(entry.config) not in known:
                known.append(str(entry.config))
                bad += 1
        for kinds in (k for dtypes in _table().values() for k in dtypes.values()):
            for known in kinds.values():
                known.sort()
        PATH.write_text(json.dumps(_table(), indent=1, sort_keys=True) + "\n")
        print(f"{len(left)} compiled, {bad} more spill")
        if not bad:
            return


if __name__ == "__main__":  # the module that the others import holds the table, not this one
    from structc.codegen.triton.spilled import learn as learn_there

    learn_there()
