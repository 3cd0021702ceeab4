"""What compiled code said of configs: bytes of registers that spill, or no room at all.

``spilled.json`` is data, by target, dtype and kind of kernel. Compiling tells what no estimate of
registers does; defaults are chosen by it. After a change of a kernel or of Triton
``python -m structc.codegen.triton.spilled`` compiles all defaults, notes what spills, and goes on
with what becomes the default instead, until there is nothing new to compile.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from structc.codegen.triton.config import Config

PATH = Path(__file__).with_name("spilled.json")
Found = dict[str, dict[str, dict[str, dict[str, int | None]]]]
"""Bytes, None for no room: by target, dtype, kernel and config."""


@functools.cache
def _table() -> Found:
    found: Found = json.loads(PATH.read_text()) if PATH.exists() else {}
    return found


def spilled(key: str, config: Config, dtype: str, target: str) -> float:
    """Bytes of a thread that a config is known to spill; infinity where it has no room.

    Args:
        key: kind of a stage, or a kernel with the width of a head: ``"monarch_left 64"``.
        config: its config.
        dtype: ``"bf16"``, ``"fp16"``, ``"fp32"``, or ``"tf32"``, which counts as that.
        target: name of a GPU.
    """
    dtype = "fp32" if dtype == "tf32" else dtype
    known = _table().get(target, {}).get(dtype, {}).get(key, {}).get(str(config), 0)
    return math.inf if known is None else known


def usable(
    kernel: str, width: int, configs: Sequence[Config], dtype: str, target: str
) -> list[Config]:
    """Configs in their order; those that are known to spill behind them, the least first.

    A width that nobody compiled counts as the next one that somebody did, or as the widest.

    >>> some = [Config(64, 64, 1, 4, 2), Config(32, 32, 1, 4, 2)]
    >>> usable("no_kernel", 64, some, "bf16", "cuda:90") == some
    True
    """
    known = _table().get(target, {}).get(dtype, {})
    widths = sorted(int(k.rsplit(" ", 1)[1]) for k in known if k.rsplit(" ", 1)[0] == kernel)
    own = next((w for w in widths if w >= width), max(widths, default=width))
    return sorted(configs, key=lambda c: spilled(f"{kernel} {own}", c, dtype, target))


def learn() -> None:
    """Compile defaults and write down what they take, until all of them were compiled."""
    from structc.codegen.triton.table import table, wanted
    from structc.codegen.triton.targets import TARGETS
    from structc.codegen.triton.tile import DTYPES

    seen: set[Any] = set()
    while True:
        every = {
            (e.key, e.config, e.case, json.dumps(asdict(e.job))): e
            for e in wanted(list(DTYPES), list(TARGETS), every=False)
        }
        left = [e for key, e in every.items() if key not in seen]
        seen |= every.keys()
        if not left:
            return
        bad = 0
        for entry, row in zip(left, table(left, progress=lambda *at: print(*at)), strict=True):
            job = entry.job
            fits = row["status"] == "ok" and row["shared_bytes"] <= TARGETS[job.target].shared
            kinds = _table().setdefault(job.target, {}).setdefault(job.dtype, {})
            known = kinds.setdefault(entry.key, {})
            before = known.get(str(entry.config), 0)
            own: int | None = row["spilled_bytes"] if fits else None
            worst = None if own is None or before is None else max(own, before)
            known[str(entry.config)] = worst
            bad += own != 0
        PATH.write_text(json.dumps(_table(), indent=1, sort_keys=True) + "\n")
        print(f"{len(left)} compiled, {bad} spill or have no room")


if __name__ == "__main__":  # the module that the others import holds the table, not this one
    from structc.codegen.triton.spilled import learn as learn_there

    learn_there()
