"""Small models of every kind that capture must take, with inputs of any size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structc.passes.region import MISS, Runner

VOCAB = 61


@dataclass(frozen=True)
class Case:
    """A model, how to call it, and at which further sizes its graph must be right.

    Attributes:
        make: the model, always with the same weights.
        inputs: keyword arguments, or a tuple, for a batch and a length.
        sizes: (batch, length) pairs other than the example's.
        regions: where graphs are expected.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]
    sizes: tuple[tuple[int, int], ...] = ((2, 9), (1, 9), (5, 4), (3, 1), (1, 1))
    example: tuple[int, int] = (2, 7)
    regions: tuple[str, ...] = ("",)
    tags: frozenset[str] = field(default_factory=frozenset)

    def model(self) -> nn.Module:
        torch.manual_seed(7)
        return self.make().eval()

    def call(self, batch: int = 0, length: int = 0) -> Any:
        return self.inputs(batch or self.example[0], length or self.example[1])


def run(model: nn.Module, inputs: Any) -> Any:
    """The model on inputs of a :class:`Case`."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def ids(batch: int, length: int) -> Tensor:
    g = torch.Generator().manual_seed(100 * batch + length)
    return torch.randint(3, VOCAB, (batch, length), generator=g)


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def padded(batch: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, (length + 1) // 2 :] = 0
    return {"input_ids": ids(batch, length), "attention_mask": mask}


def bert(layers: int = 1, **config: Any) -> nn.Module:
    import transformers as T

    return T.BertModel(
        T.BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=40,
            **config,
        )
    )


def gpt2() -> nn.Module:
    import transformers as T

    return T.GPT2LMHeadModel(
        T.GPT2Config(
            vocab_size=VOCAB,
            n_positions=40,
            n_embd=32,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def llama() -> nn.Module:
    import transformers as T

    return T.LlamaForCausalLM(
        T.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def vit() -> nn.Module:
    import transformers as T

    return T.ViTModel(
        T.ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        )
    )


def sequential(n: int = 12, hidden: int = 20, m: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n, hidden), nn.GELU(), nn.Linear(hidden, m))


class Functional(nn.Module):
    """Never a module for its products; every spelling with a constant weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(20, 12) / 4)
        self.b = nn.Parameter(torch.randn(20, 16) / 4)
        self.c = nn.Parameter(torch.randn(8, 16) / 4)
        self.bias = nn.Parameter(torch.randn(20))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, self.a, self.bias)) @ self.b @ self.c.T


class Experts(nn.Module):
    """The second expert sees positive inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if bool((x > 0).all()) else y


class Branches(nn.Module):
    """Data-dependent control flow around its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))
        self.down = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if float(y.sum()) > 0:
            y = self.down(y)
        return y - x


class Counter(nn.Module):
    """Changes buffers whenever it runs, in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sequential()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(self.inner(x))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 1)


FEATURES = ((7, 1), (1, 1), (5, 3), (1, 3))
ZOO: dict[str, Case] = {
    "sequential": Case(sequential, lambda b, t: (floats(b, t, 12),)),
    "functional": Case(Functional, lambda b, t: (floats(b, t, 12),)),
    "branches": Case(Branches, lambda b, t: (floats(b, t, 12),), regions=("up",)),
    "encoder": Case(encoder, lambda b, t: (floats(b, t, 32),)),
    "bert": Case(bert, padded),
    "gpt2": Case(gpt2, lambda b, t: {"input_ids": ids(b, t)}, regions=("transformer.h.0.mlp",)),
    "gpt2-no-cache": Case(gpt2, lambda b, t: {"input_ids": ids(b, t), "use_cache": False}),
    "llama": Case(llama, lambda b, t: {"input_ids": ids(b, t)}, regions=("model.layers.0.mlp",)),
    "vit": Case(
        vit, lambda b, t: {"pixel_values": floats(b, 3, 16, 16)}, sizes=((1, 1), (3, 1), (6, 1))
    ),
}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often regions ran their graph, and how often their guards sent a call to the module."""
    counts = {"graph": 0, "tree": 0}
    run_region = Runner.run

    def counting(self: Runner, *args: Any) -> Any:
        output = run_region(self, *args)
        counts["tree" if output is MISS else "graph"] += 1
        return output

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", counting)
        yield counts


def refusals_in(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every refusal in a report's data, wherever it stands."""
    found: list[dict[str, Any]] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "code" in value and "reason" in value:
                found.append(value)
            for v in value.values():
                walk(v)
        elif isinstance(value, list):
            for v in value:
                walk(v)

    walk(report)
    return found
