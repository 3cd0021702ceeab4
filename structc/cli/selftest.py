"""``python -m structc.cli.selftest``: build one kernel, check it, print what came of it as JSON.

A process of its own: a kernel that crashes must not take ``structc doctor`` with it.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Build and check one emitted kernel and one oneDNN product."""
    import torch

    from structc.codegen import lower
    from structc.families import LowRank
    from structc.forms import PackedDense
    from structc.records import Refusal

    start = time.perf_counter()
    form = LowRank.form_of(64, 48, {"rank": 8}, bias=True, activation="gelu")
    tile = lower.make(form, torch.float32, 32, "tile", {})  # tested against float64 when loaded
    seconds = time.perf_counter() - start
    onednn = lower.make(PackedDense(64, 48, ""), torch.float32, 32, "onednn", {})
    reasons = {
        name: f"{made.code}: {made.reason}" if isinstance(made, Refusal) else ""
        for name, made in (("tile", tile), ("onednn", onednn))
    }
    json.dump({**reasons, "seconds": seconds}, sys.stdout)


if __name__ == "__main__":
    main()
