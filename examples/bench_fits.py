"""Measure what fits gain and cost: STS-B with low rank, a Monarch projection, all families.

    python examples/bench_fits.py --data FOLDER     with stsb-en-train.csv
    python examples/bench_fits.py --data FOLDER --table     each family on each layer, too
    python examples/bench_fits.py                   the projection alone
    python examples/bench_fits.py --large 4096     time and memory at this size (Linux)

Every layer of all-MiniLM-L6-v2 but the pooler becomes low rank with the same share of parameters;
fits see a sixth of the training pairs, the correlation is read on others. Nothing is fine-tuned.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # also runs from a checkout

import torch
from torch import Tensor, nn

from examples.bench_minilm import read_pairs, spearman
from examples.minilm import batches, load
from structc.families import BY_NAME, Butterfly, Monarch, Pixelfly
from structc.inputs import to_call
from structc.passes.calibrate import calibrate
from structc.passes.capture import capture
from structc.passes.curvature import output_grams
from structc.passes.detect import detect
from structc.passes.fit import materialise, one_thread_each
from structc.passes.objective import Objectives
from structc.passes.rewrite import rewrite
from structc.records import Profile
from structc.workdir import WorkDir

Layer = tuple[str, Tensor, Tensor | None]
"""Name, weight and Gram matrix of a layer's inputs."""


def layers(model: nn.Module, tokenizer: Any, data: Path) -> list[Layer]:
    """The linear layers of the model but the pooler, with what a sixth of the texts put in."""
    texts = sorted((t for p in read_pairs(data / "stsb-en-train.csv")[::6] for t in p[:2]), key=len)
    calls = [to_call(b) for b in batches(tokenizer, texts, 64)]
    captured = capture(model, calls[0])
    sites = detect(captured)
    profile = calibrate(captured, sites, calls, work=WorkDir(None, {}), memory_mb=1000)
    objectives, found = Objectives(captured, profile), []
    for site in sites.linear:
        if site.name != "pooler.dense":
            objective = objectives.of(site)
            found.append((site.name, objective.weight, objective.gram))
    return found


def sized(n: int, m: int, share: float) -> dict[str, dict[str, Any]]:
    """Hyper-parameters that leave each family this share of the parameters of an m x n weight."""
    full, side = int(n * m * share), {384: 16, 1536: 32}
    n1, m1 = side[n], side[m]
    pixels = full - 3 * n * m // 16
    middle = max(r for r in range(1, 200) if butterfly_params(n, m, r) <= full)
    return {
        "low_rank": {"rank": full // (n + m)},
        "monarch": {"in_blocks": 4, "out_blocks": 4, "rank": full // (4 * (n + m))},
        "blast": {"blocks": 8, "rank": full // (n + m + 64)},
        "pixelfly": {"blocks": 16, "levels": 2, "rank": pixels // (n + m)},
        "kronecker": {
            "in_outer": n1,
            "out_outer": m1,
            "terms": full // (n1 * m1 + n * m // (n1 * m1)),
        },
        "block_sparse": {"height": 32, "width": 32, "count": full // 1024},
        "block_diagonal": {"blocks": round(1 / share), "order": "clustered"},
        "butterfly": {"levels": 3, "rank": middle},
    }


def butterfly_params(n: int, m: int, rank: int) -> int:
    """Parameters of a butterfly of three levels; infinitely many for a rank it cannot have."""
    hyper = {"levels": 3, "rank": rank}
    try:
        return Butterfly.form_of(n, m, hyper, bias=False, activation="").params
    except ValueError:
        return sys.maxsize


def table(found: Sequence[Layer], share: float) -> Iterator[str]:
    """Lines: the error of each family at a share of the parameters, its null, and fit times."""
    names = list(sized(384, 384, share))
    yield f"{'layer':34}" + "".join(f"{name:>15}" for name in names) + "  best"
    times, wins = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    found_errors: list[list[float]] = []
    gains: list[list[float]] = []

    def one(layer: Layer) -> tuple[list[float], list[float], list[float]]:
        errors, nulls, seconds = [], [], []
        m, n = layer[1].shape
        for name, hyper in sized(n, m, share).items():
            start = time.perf_counter()
            module = BY_NAME[name].fit(layer[1], layer[2], **hyper)  # type: ignore[attr-defined]
            seconds.append(time.perf_counter() - start)
            errors.append(module.fit_error)
            nulls.append(module.null_error())
        return errors, nulls, seconds

    start = time.perf_counter()
    with one_thread_each() as pool:
        for layer, (errors, nulls, seconds) in zip(found, pool.map(one, found), strict=True):
            best = names[errors.index(min(errors))]
            wins[best] += 1
            for name, second in zip(names, seconds, strict=True):
                times[name] += second
            found_errors.append(errors)
            gains.append([e / errors[0] for e in errors])
            cells = "".join(f"{e:>8.3f}/{null:.3f} " for e, null in zip(errors, nulls, strict=True))
            yield f"{layer[0].removeprefix('encoder.layer.'):34}{cells} {best}"
    yield f"{'seconds, all layers':34}" + "".join(f"{times[name]:>14.1f} " for name in names)
    yield f"{'best on so many layers':34}" + "".join(f"{wins[name]:>14} " for name in names)
    below = [sum(r <= 1 for r in column) for column in zip(*gains, strict=True)]
    yield f"{'at or below low rank on':34}" + "".join(f"{count:>14} " for count in below)
    medians = [statistics.median(e) for e in zip(*found_errors, strict=True)]
    yield f"{'median error':34}" + "".join(f"{error:>14.3f} " for error in medians)
    ratios = [statistics.median(r) for r in zip(*gains, strict=True)]
    yield f"{'median error / low rank':34}" + "".join(f"{ratio:>14.3f} " for ratio in ratios)
    yield f"{len(found)} layers in {time.perf_counter() - start:.0f} s"


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


def large(size: int) -> Iterator[str]:
    """Lines: seconds and peak memory, in weights of float64, of a fit to noise; blind, on data."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    x = torch.randn(size * 3 // 2, size, generator=generator, dtype=torch.float64)
    x *= torch.logspace(0, -1.5, size, dtype=torch.float64)
    gram = x.T @ x / len(x)
    del x
    half, side = size * size // 2, 2 ** (size.bit_length() // 2)
    hypers: dict[str, dict[str, Any]] = {
        "low_rank": {"rank": size // 4},
        "monarch": {"in_blocks": 4, "out_blocks": 4, "rank": size // 16},
        "blast": {"blocks": 8, "rank": half // (2 * size + 64)},
        "pixelfly": dict(Pixelfly.proposals(size, size)[0]),
        "kronecker": {"in_outer": side, "out_outer": side, "terms": side // 2},
        "butterfly": dict(Butterfly.proposals(size, size)[0]),
        "block_sparse": {"height": 64, "width": 64, "count": half // 4096},
        "block_diagonal": {"blocks": 2, "order": "clustered"},
        "displacement": {"rank": 2},
        **{name: {} for name in ("toeplitz", "hankel", "circulant")},
    }
    for name, hyper in hypers.items():
        cells = []
        for metric in (None, gram):
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
            before, start = _memory("VmRSS"), time.perf_counter()
            module = BY_NAME[name].fit(weight, metric, **hyper)  # type: ignore[attr-defined]
            seconds, peak = time.perf_counter() - start, _memory("VmHWM") - before
            cells.append(
                f"{seconds:6.1f} s {peak / (8 * size * size):5.1f}x  error {module.fit_error:.3f}"
            )
        yield f"{name:16}" + "   ".join(cells) + f"   {hyper}"


def _memory(key: str) -> int:
    """Bytes that the kernel says this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


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
    parser.add_argument("--table", action="store_true", help="every family on every layer")
    parser.add_argument("--large", type=int, metavar="SIZE", help="time and memory at this size")
    options = parser.parse_args(argv)
    if options.large:
        print("family            without data: seconds, peak in weights of float64   with data")
        for line in large(options.large):
            print(line, flush=True)
        return
    print(f"Monarch projection of 4096 x 4096, 4 x 4 grid, rank 256: {projection():.1f} s")
    if options.data is None:
        return
    model, tokenizer = load(options.models)
    if options.table:
        found = layers(model, tokenizer, options.data)
        for share in (0.5, 0.25):
            print(f"error / null at {share:.0%} of the parameters:")
            for line in table(found, share):
                print(line, flush=True)
    for share, blind, aware in drops(model, tokenizer, options.data, (0.75, 0.5)):
        print(
            f"low rank, {share:.0%} of the parameters: STS-B drops by {blind:.1%} with the Gram of "
            f"inputs, by {aware:.1%} with that of outputs too"
        )


if __name__ == "__main__":
    main()
