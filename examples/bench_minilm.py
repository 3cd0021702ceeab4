"""Measure what the README claims about all-MiniLM-L6-v2: both tiers, time and STS-B quality.

    python examples/bench_minilm.py --data FOLDER     with stsb-en-train.csv and stsb-en-dev.csv
    python examples/bench_minilm.py                   without labels: the exact tier alone

STS-B files are rows of sentence, sentence, score without a header. Fits see the texts of training
pairs, selection and verification see other training pairs each, the dev set is read once at the
end.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # also runs from a checkout

import torch
from torch import nn

import structc
from examples.minilm import batches, embed, example, load

Pair = tuple[str, str, float]


def read_pairs(path: Path) -> list[Pair]:
    """Rows of an STS-B file."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [(row[0], row[1], float(row[2])) for row in csv.reader(stream)]


def spearman(model: nn.Module, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """Rank correlation of cosine similarities with the human scores."""
    from scipy.stats import spearmanr

    texts = [text for pair in pairs for text in pair[:2]]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = embed(model, batches(tokenizer, [texts[i] for i in order], 64))
    found = torch.empty_like(rows)
    found[torch.tensor(order)] = rows
    cosines = (found[0::2] * found[1::2]).sum(1)
    return float(spearmanr(cosines.numpy(), [p[2] for p in pairs]).statistic)


def exact(model: nn.Module, effort: str) -> dict[str, Any]:
    """The exact tier at 32 texts of 128 tokens."""
    start = time.perf_counter()
    fast = structc.compile(model, example(), effort=effort)
    return row("exact", fast, time.perf_counter() - start)


def approximate(
    model: nn.Module, tokenizer: Any, data: Path, effort: str, max_drop: float
) -> dict[str, Any]:
    """The approximate tier with the STS-B metric, and the dev set."""
    train = read_pairs(data / "stsb-en-train.csv")
    random.Random(0).shuffle(train)  # the file is sorted by source
    texts = sorted((t for p in train[:1000] for t in p[:2]), key=len)
    parts = {"select": train[1000:2200], "verify": train[2200:3400]}

    def stsb(candidate: nn.Module, part: str) -> float:
        return spearman(candidate, tokenizer, parts[part])

    start = time.perf_counter()
    fast = structc.compile(
        model,
        example(),
        calibration=batches(tokenizer, texts, 128),
        budget=structc.Budget(metric=stsb, max_drop=max_drop),
        effort=effort,
    )
    found = row("approximate", fast, time.perf_counter() - start)
    dev = read_pairs(data / "stsb-en-dev.csv")
    dense, ours = spearman(model, tokenizer, dev), spearman(fast, tokenizer, dev)
    return {**found, "dev_dense": dense, "dev": ours, "dev_kept": ours / dense}


def row(tier: str, fast: Any, seconds: float) -> dict[str, Any]:
    """What a conversion's own verification measured."""
    data = fast.report.to_dict()
    latency = {v["name"]: v for v in data["latency"]}
    best = min(v["latency_ms"] for n, v in latency.items() if n != "structc")
    ours = latency["structc"]["latency_ms"]
    return {
        "tier": tier,
        "seconds": seconds,
        "peak_memory_mb": data["peak_memory_mb"],
        "latency_ms": {n: v["latency_ms"] for n, v in latency.items()},
        "spread": {n: v["spread"] for n, v in latency.items()},
        "over_eager": latency["eager"]["latency_ms"] / ours,
        "over_best_dense": best / ours,
        "error": data["verification"]["error"],
        "runner": data["verification"]["runner"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tiers as JSON lines and as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=".models")
    parser.add_argument("--data", type=Path, help="folder with the STS-B files")
    parser.add_argument("--effort", default="quick", choices=("none", "quick", "full"))
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    model, tokenizer = load(options.models)
    jobs: list[Callable[[], dict[str, Any]]] = [lambda: exact(model, options.effort)]
    if options.data is not None:
        jobs.append(
            lambda: approximate(model, tokenizer, options.data, options.effort, options.max_drop)
        )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    for job in jobs:
        found = job()
        if options.json:
            print(json.dumps(found))
            continue
        print(f"\n{found['tier']}: {found['seconds']:.0f} s, {found['peak_memory_mb']:.0f} MB")
        for name, ms in found["latency_ms"].items():
            print(f"  {name:26} {ms:8.1f} ms  spread {found['spread'][name]:.1%}")
        print(f"  over eager {found['over_eager']:.2f}x", end=", ")
        print(f"over the best dense {found['over_best_dense']:.2f}x, runs as {found['runner']}")
        print(f"  largest relative output error {found['error']:.2e}")
        if "dev" in found:
            print(
                f"  STS-B dev Spearman {found['dev']:.4f}, dense {found['dev_dense']:.4f}: "
                f"{found['dev_kept']:.2%} kept"
            )


if __name__ == "__main__":
    main()
