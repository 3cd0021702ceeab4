"""Measure what fits gain and cost: the STS-B figures of low rank, and a Monarch projection.

    python examples/bench_fits.py --data FOLDER     with stsb-en-train.csv
    python examples/bench_fits.py                   the projection alone

Every layer of all-MiniLM-L6-v2 but the pooler becomes low rank with the same share of parameters;
fits see a sixth of the training pairs, the correlation is read on others. Nothing is fine-tuned.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # also runs from a checkout

import torch
from torch import nn

from examples.bench_minilm import read_pairs, spearman
from examples.minilm import batches, load
from structc.families import Monarch
from structc.inputs import to_call
from structc.passes.calibrate import calibrate
from structc.passes.capture import capture
from structc.passes.curvature import output_grams
from structc.passes.detect import detect
from structc.passes.fit import materialise
from structc.passes.objective import Objectives
from structc.passes.rewrite import rewrite
from structc.records import Profile
from structc.workdir import WorkDir


def drops(
    model: nn.Module, tokenizer: Any, data: Path, shares: Sequence[float]
) -> Iterator[tuple[float, float, float]]:
    """For each share of parameters the relative drop of Spearman, blind to outputs and aware."""
    train = read_pairs(data / "stsb-en-train.csv")
    texts = sorted((t for p in train[::6] for t in p[:2]), key=len)
    calls = [to_call(b) for b in batches(tokenizer, texts, 64)]
    captured = capture(model, calls[0])
    sites, work = detect(captured), WorkDir(None, {})
    blind = calibrate(captured, sites, calls, work=work, memory_mb=1000)
    grams, _ = output_grams(captured, sites, calls, work=work, memory_mb=1000)
    aware = Profile(blind.stats, blind.batches, blind.rows, out_grams=grams)
    pairs = train[3::4]
    dense = spearman(model, tokenizer, pairs)

    def drop(profile: Profile, share: float) -> float:
        objectives, modules = Objectives(captured, profile), {}
        for site in sites.linear:
            n, m = site.in_features, site.out_features
            if site.name != "pooler.dense":
                rank = int(share * n * m / (n + m))
                modules[site.name] = materialise(objectives, site, "low_rank", {"rank": rank})
        product = rewrite(captured, sites, modules)  # type: ignore[arg-type]
        return 1 - spearman(product.tree, tokenizer, pairs) / dense

    for share in shares:
        yield share, drop(blind, share), drop(aware, share)


def projection(size: int = 4096) -> float:
    """Seconds of a Monarch projection: a 4 x 4 grid, rank for half of the parameters."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    module = Monarch.fit(weight, in_blocks=4, out_blocks=4, rank=size // 16)
    assert isinstance(module, Monarch)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=".models")
    parser.add_argument("--data", type=Path, help="folder with stsb-en-train.csv")
    options = parser.parse_args(argv)
    print(f"Monarch projection of 4096 x 4096, 4 x 4 grid, rank 256: {projection():.1f} s")
    if options.data is None:
        return
    model, tokenizer = load(options.models)
    for share, blind, aware in drops(model, tokenizer, options.data, (0.75, 0.5)):
        print(
            f"low rank, {share:.0%} of the parameters: STS-B drops by {blind:.1%} with the Gram of "
            f"inputs, by {aware:.1%} with that of outputs too"
        )


if __name__ == "__main__":
    main()
