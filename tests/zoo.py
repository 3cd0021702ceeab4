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


def small(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A model of transformers by the name of its class, 32 wide, with 4 heads."""

    def make() -> nn.Module:
        import transformers as T

        kind = getattr(T, name)
        return kind(kind.config_class(**{"vocab_size": VOCAB, "pad_token_id": 0, **config}))

    return make


class WithWeights(nn.Module):
    """PyTorch's module in the way that spells its attention out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=True)[0]


class NanoGPT(nn.Module):
    """Causal attention with a triangle in a buffer (Karpathy's nanoGPT without flash)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, 4, c // 4).transpose(1, 2) for y in self.qkv(x).split(c, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (k.size(-1) ** -0.5)
        scores = scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


def tokens(batch: int, length: int) -> dict[str, Any]:
    return {"input_ids": ids(batch, length), "use_cache": False}


def pair(batch: int, length: int) -> dict[str, Any]:
    return {**tokens(batch, length), "decoder_input_ids": ids(batch, length + 2)}


def speech(batch: int, length: int) -> dict[str, Any]:
    heard = {"input_features": floats(batch, 8, 40), "use_cache": False}
    return {**heard, "decoder_input_ids": ids(batch, length)}


T5_CONFIG: dict[str, Any] = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 20, "max_target_positions": 40, "bos_token_id": 0, "eos_token_id": 0,
    "decoder_start_token_id": 1,
}  # fmt: skip
ATTENTION: dict[str, tuple[Case, tuple[str, ...]]] = {
    "T5 encoder": (Case(small("T5EncoderModel", **T5_CONFIG), padded), ("",)),
    "T5": (
        Case(small("T5Model", decoder_start_token_id=0, **T5_CONFIG), pair),
        ("by lag", "causal, by lag", "all_true"),
    ),
    "BLOOM": (Case(small("BloomModel", hidden_size=32, n_layer=1, n_head=4), tokens), ("causal",)),
    "MPT": (
        Case(small("MptModel", d_model=32, n_layers=1, n_heads=4, max_seq_len=48), tokens),
        ("causal",),
    ),
    "Whisper": (Case(small("WhisperModel", **WHISPER), speech), ("all_true", "causal", "all_true")),
    "GPT-OSS": (
        Case(small("GptOssModel", num_local_experts=2, num_experts_per_tok=1, **DECODER), tokens),
        ("causal, window 5", "causal"),
    ),
    "Gemma 2": (
        Case(
            small(
                "Gemma2Model", attn_logit_softcapping=5.0, attn_implementation="eager", **DECODER
            ),
            tokens,
        ),
        ("causal, window 5", "causal"),
    ),
    "MultiheadAttention": (Case(WithWeights, lambda b, t: (floats(b, t, 32),)), ("all_true",)),
    "TransformerEncoder": (Case(encoder, lambda b, t: (floats(b, t, 32),)), ("all_true",)),
    "nanoGPT": (Case(NanoGPT, lambda b, t: (floats(b, t, 32),)), ("causal",)),
}
"""Models by the way their attention is made, and what their graphs prove, one after another."""


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
