"""Attention of a language model on long inputs: the exact tier, then methods head by head.

    python examples/bench_heads.py MODEL TEXT                    MODEL is a Hugging Face folder
    python examples/bench_heads.py MODEL TEXT --max-drop 1%      what perplexity may lose

Linear layers stay as they are, so what changes is attention alone. The text is cut into windows:
calibration, selection, verification and the perplexity at the end see different ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # also runs from a checkout

import torch
from torch import Tensor, nn

import structc

CALIBRATION, TESTED = 8, 6
"""Windows of the text: for calibration, and for the perplexity that is printed."""


class Logits(nn.Module):
    """A causal language model without a cache: ids in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def windows(folder: Path, text: Path, length: int) -> list[Tensor]:
    """The text as token ids, in rows."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(
        text.read_text(encoding="utf-8"), add_special_tokens=False
    )
    return list(torch.tensor(ids.ids).split(length)[:-1])


@torch.no_grad()
def perplexity(model: nn.Module, rows: Sequence[Tensor]) -> float:
    """Of next tokens, mean over rows."""
    losses = [
        nn.functional.cross_entropy(model(row[None])[0, :-1].float(), row[1:]) for row in rows
    ]
    return math.exp(float(torch.stack(losses).mean()))


def compiled(
    model: nn.Module, rows: Sequence[Tensor], budget: structc.Budget, effort: str
) -> structc.CompiledModel:
    """Attention rewritten inside a budget, linear layers as they are."""
    keep = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear})
    calibration = None if budget.exact else [row[None] for row in rows[:CALIBRATION]]
    return structc.compile(
        model, rows[0][None], calibration=calibration, budget=budget, ignore=keep, effort=effort
    )


def metric_on(rows: Sequence[Tensor]) -> Callable[[nn.Module, str], float]:
    """One over perplexity: higher is better, and one percent of it is one of perplexity."""

    def inverse_perplexity(model: nn.Module, part: str) -> float:
        return 1 / perplexity(model, rows[:2] if part == "select" else rows[2:4])

    return inverse_perplexity


def main() -> None:
    """Compile both tiers and print what each gained and cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, help="Hugging Face folder with tokenizer.json")
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tier", choices=("exact", "heads"), help="one alone")
    parser.add_argument("--max-drop", default="1%", help="of one over perplexity")
    parser.add_argument("--effort", default="quick", choices=("quick", "full"))
    parser.add_argument("--save", type=Path, help="folder for reports")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = Logits(AutoModelForCausalLM.from_pretrained(args.model).float().eval())
    rows = windows(args.model, args.text, args.length)
    held, tested = rows[-TESTED - 4 : -TESTED], rows[-TESTED:]
    known = rows[: -TESTED - 4 : max(1, (len(rows) - TESTED - 4) // CALIBRATION)]
    print(f"original: perplexity {perplexity(model, tested):.3f} on {TESTED} windows", flush=True)
    budgets = {
        "exact": structc.Budget(),
        "heads": structc.Budget(metric=metric_on(held), max_drop=args.max_drop),
    }
    for name, budget in budgets.items():
        if args.tier not in (None, name):
            continue
        start = time.perf_counter()
        fast = compiled(model, known, budget, args.effort)
        took = time.perf_counter() - start
        print(f"{name}: perplexity {perplexity(fast, tested):.3f}, compiled in {took:.0f} s")
        print(json.dumps(summary(fast), indent=1), flush=True)
        if args.save is not None:
            args.save.mkdir(parents=True, exist_ok=True)
            fast.report.save(args.save / f"{name}.html")
            fast.report.save(args.save / f"{name}.json")


def summary(fast: structc.CompiledModel) -> dict[str, Any]:
    """Times of the whole model and of attention, and how many heads take which method."""
    data = fast.report.to_dict()
    methods: dict[str, int] = {}
    for row in (r for op in data["attention"] for r in op["head_rows"]):
        name = row["method"].partition(",scale")[0] or "exact"
        methods[name] = methods.get(name, 0) + 1
    times = {k: [op[k] for op in data["attention"]] for k in ("dense_ms", "chosen_ms")}
    return {
        "headline": data["headline"],
        "latency_ms": {row["name"]: round(row["latency_ms"], 1) for row in data["latency"]},
        "attention_ms": {k: round(sum(filter(None, v)), 2) for k, v in times.items()},
        "heads": dict(sorted(methods.items(), key=lambda item: -item[1])),
    }


if __name__ == "__main__":
    main()
