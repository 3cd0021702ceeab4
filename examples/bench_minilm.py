"""Measure what the README claims about all-MiniLM-L6-v2: both tiers, time and STS-B quality.

    python examples/bench_minilm.py --data FOLDER     with stsb-en-train.csv and stsb-en-dev.csv
    python examples/bench_minilm.py                   without labels: the exact tier alone
    python examples/bench_minilm.py --half bfloat16   each layer at half its parameters: speed alone

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # also runs from a checkout

import torch
from torch import nn

import structc
from examples.minilm import batches, embed, example, load
from structc.inputs import to_call
from structc.passes.verify import baselines, caller
from structc.records import Timed
from structc.timing import interleaved

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


def exact(model: nn.Module, effort: str) -> tuple[nn.Module, dict[str, Any]]:
    """The exact tier at 32 texts of 128 tokens."""
    start = time.perf_counter()
    fast = structc.compile(model, example(), effort=effort)
    return fast, row(fast, time.perf_counter() - start)


def approximate(
    model: nn.Module, tokenizer: Any, data: Path, effort: str, max_drop: float
) -> tuple[nn.Module, dict[str, Any]]:
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
    found = row(fast, time.perf_counter() - start)
    dev = read_pairs(data / "stsb-en-dev.csv")
    dense, ours = spearman(model, tokenizer, dev), spearman(fast, tokenizer, dev)
    return fast, {**found, "dev_dense": dense, "dev": ours, "dev_kept": ours / dense}


HALF = {
    "re:.*(query|key|value|attention.output.dense)": {"family": "low_rank", "rank": 96},
    "re:.*(intermediate.dense|layer.[0-9]+.output.dense)": {"family": "low_rank", "rank": 153},
    "_default": None,
}


def half(model: nn.Module, effort: str) -> tuple[nn.Module, dict[str, Any]]:
    """Every layer of the encoder at half its parameters, whatever it does to the embeddings."""
    start = time.perf_counter()
    budget = structc.Budget(error=100.0)
    fast = structc.compile(model, example(), budget=budget, config=HALF, effort=effort)
    return fast, row(fast, time.perf_counter() - start)


def row(fast: Any, seconds: float) -> dict[str, Any]:
    """What a conversion took, and what its own verification measured."""
    data = fast.report.to_dict()
    return {
        "seconds": seconds,
        "peak_memory_mb": data["peak_memory_mb"],
        "error": data["verification"]["error"],
        "runs_as": data["verification"]["runner"],
    }


def together(model: nn.Module, products: Mapping[str, nn.Module], rounds: int) -> dict[str, Timed]:
    """All products and all dense versions in one interleaved run."""
    dense, notes = baselines(model, to_call(example()), compiled=True)
    for note in notes:
        print(note, file=sys.stderr)
    ours = {name: caller(product, to_call(example())) for name, product in products.items()}
    return interleaved({**dense, **ours}, rounds=rounds, min_sample_ms=5.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert in both tiers, then time everything in one run; a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=".models")
    parser.add_argument("--data", type=Path, help="folder with the STS-B files")
    parser.add_argument("--effort", default="quick", choices=("none", "quick", "full"))
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--half", choices=("float32", "bfloat16"), help="speed alone")
    parser.add_argument("--rounds", type=int, default=31, help="of the final timing")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(argv)
    model, tokenizer = load(options.models)
    if options.half is not None:
        model = model.to(getattr(torch, options.half))
        made = {f"structc, {options.half}, half": half(model, options.effort)}
    else:
        made = {"structc, exact": exact(model, options.effort)}
    if options.data is not None and options.half is None:
        name = f"structc, max_drop={options.max_drop:.0%}"
        made[name] = approximate(model, tokenizer, options.data, options.effort, options.max_drop)
    timed = together(model, {n: fast for n, (fast, _) in made.items()}, options.rounds)
    best = min(t.latency_ms for n, t in timed.items() if n not in made)
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "rows": {
            name: {
                "latency_ms": t.latency_ms,
                "median_ms": t.median_ms,
                "spread": t.spread,
                "over_eager": timed["eager"].latency_ms / t.latency_ms,
                "over_best_dense": best / t.latency_ms,
                **(made[name][1] if name in made else {}),
            }
            for name, t in timed.items()
        },
    }
    print(json.dumps(result) if options.json else table(result))


def table(result: Mapping[str, Any]) -> str:
    """The result as people read it."""
    lines = [f"torch {result['torch']}, {result['threads']} threads, {result['machine']}", ""]
    for name, r in result["rows"].items():
        lines.append(
            f"{name:24} {r['latency_ms']:7.1f} ms (median {r['median_ms']:.1f}, spread "
            f"{r['spread']:.1%})  {r['over_eager']:.2f}x eager, "
            f"{r['over_best_dense']:.2f}x best dense"
        )
        if "seconds" in r:
            lines.append(
                f"{'':24} converted in {r['seconds']:.0f} s, {r['peak_memory_mb']:.0f} MB; largest "
                f"output error {r['error']:.2e}; runs as {r['runs_as']}"
            )
        if "dev" in r:
            lines.append(
                f"{'':24} STS-B dev Spearman {r['dev']:.4f}, dense {r['dev_dense']:.4f}: "
                f"{r['dev_kept']:.2%} kept"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
