"""A Hugging Face folder on disk: model, tokenizer, and batches made of text. Never the network."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structc.errors import ConfigError, StructcError, UnsupportedModel
from structc.inputs import signature_of
from structc.sources.source import Source, TextOptions
from structc.sources.texts import BUILT_IN, read_texts

SAMPLES, BATCH, LENGTH = 128, 8, 128
"""Defaults of --nsamples, --batch-size and, at most, of --seqlen."""
ROUND_TO = 8
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "merges.txt")
OWN_FACTORY = "Write a file.py with a function that loads it, and give file.py:function."


@dataclass(frozen=True)
class Shape:
    """Of one batch."""

    items: int
    tokens: int


def from_folder(path: Path, text: TextOptions) -> Source:
    """The model of a folder, with example inputs and calibration made of text.

    Errors: :class:`ConfigError` if transformers is missing, or the folder does not load;
        :class:`UnsupportedModel` for a model that needs code of its own or does not take text.
    """
    transformers = _transformers()
    model = _model(transformers, path)
    tokenizer = _tokenizer(transformers, path)
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        kind = "encodes and decodes" if model.config.is_encoder_decoder else "takes no token ids"
        raise UnsupportedModel(
            f"MODEL {str(path)!r}: {type(model).__name__} {kind}: no inputs can be made for it",
            hint=OWN_FACTORY,
        )
    made = _Batches(model, tokenizer, _limit(model, tokenizer))
    items = text.batch_size or BATCH
    if text.calib is None:
        shape = Shape(items, made.length(text.seqlen, LENGTH))
        note = (
            f"no --calib: example inputs are {shape.items} x {shape.tokens} tokens of a built-in "
            "text, and fits are data-free"
        )
        return Source(model, made.packed(list(BUILT_IN), shape, 1)[0], None, None, (note,))
    texts, how = read_texts(text.calib, text.nsamples or SAMPLES)
    shape = Shape(items, made.length(text.seqlen, made.longest(texts)))
    if made.is_causal:
        batches = made.packed(texts, shape, -(-(text.nsamples or SAMPLES) // items))
        example = batches[0]
    else:
        batches = made.padded(texts, shape)
        example = made.padded((texts * items)[:items], shape, full=True)[0]
    note = (
        f"calibration: {len(texts)} texts ({how}) of {text.calib.name}, {len(batches)} batches of "
        f"up to {shape.items} x {shape.tokens} tokens"
    )
    return Source(model, example, batches, None, (note,))


def _transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError as e:
        raise ConfigError(
            f"a Hugging Face folder needs the package transformers, which cannot be imported: {e}",
            hint="Install the extra: pip install 'structc[hf]'.",
        ) from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _model(transformers: Any, path: Path) -> Any:
    if not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"MODEL {str(path)!r}: there is no .safetensors file in it",
            hint="Weights in pickle files are not loaded: save the model again as safetensors.",
        )
    quiet = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **quiet)
        kind = _class_of(transformers, config)
        model = kind.from_pretrained(path, config=config, use_safetensors=True, **quiet)
    except StructcError:
        raise
    except Exception as e:  # transformers raises whatever a broken file makes it raise
        raise _unloadable(path, "model", e) from e
    return model.eval()


def _class_of(transformers: Any, config: Any) -> Any:
    """The class that the folder names, if transformers has it for this configuration."""
    for name in config.architectures or ():
        kind: Any = getattr(transformers, name, None) if str(name).isidentifier() else None
        is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if is_model and kind.config_class is type(config):
            return kind
    return transformers.AutoModel


def _tokenizer(transformers: Any, path: Path) -> Any:
    if not any(True for pattern in VOCABULARIES for _ in path.glob(pattern)):
        # transformers would make one without words, to which every text is unknown
        raise ConfigError(
            f"MODEL {str(path)!r}: there is no tokenizer in it",
            hint=f"Copy it there. {OWN_FACTORY}",
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as e:
        raise _unloadable(path, "tokenizer", e) from e
    if tokenizer.pad_token is None:  # decoders have none; the mask hides what it fills
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _unloadable(path: Path, what: str, error: Exception) -> StructcError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0][:300] if lines else "no message"
    if "remote" in str(error) or "auto_map" in str(error):
        return UnsupportedModel(
            f"MODEL {str(path)!r}: its {what} needs code from the folder, which is never run here",
            hint=OWN_FACTORY,
        )
    return ConfigError(
        f"MODEL {str(path)!r}: transformers cannot load its {what}: "
        f"{type(error).__name__}: {first}",
        hint=f"Check that the folder is complete. {OWN_FACTORY}",
    )


def _limit(model: Any, tokenizer: Any) -> int:
    """The longest sequence that model and tokenizer take."""
    most = getattr(model.config, "max_position_embeddings", None)
    limits = [n for n in (most, tokenizer.model_max_length) if isinstance(n, int) and n > 0]
    return min(limits, default=2**31)


class _Batches:
    """Batches of one model's inputs."""

    def __init__(self, model: Any, tokenizer: Any, limit: int) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        self.is_causal = model.can_generate()  # encoder-decoders are refused before
        taken = signature_of(model).parameters
        self.names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in taken]

    def length(self, asked: int | None, default: int) -> int:
        """Tokens an item."""
        if asked is not None and asked > self.limit:
            raise ConfigError(
                f"--seqlen {asked}: the model takes at most {self.limit} tokens",
                hint="Give a smaller one.",
            )
        return asked or min(default, self.limit)

    def longest(self, texts: list[str]) -> int:
        """The length of the longest text, rounded up, or the default where that is less."""
        cut = self.tokenizer(texts, truncation=True, max_length=min(LENGTH, self.limit))
        if self.is_causal:
            return min(LENGTH, self.limit)
        most = max(map(len, cut["input_ids"]))
        return min(-(-most // ROUND_TO) * ROUND_TO, LENGTH, self.limit)

    def padded(self, texts: list[str], shape: Shape, *, full: bool = False) -> list[dict[str, Any]]:
        """One text an item, padded to the longest of its batch, or to the full length."""
        batches = []
        for at in range(0, len(texts), shape.items):
            batch = self.tokenizer(
                texts[at : at + shape.items],
                truncation=True,
                max_length=shape.tokens,
                padding="max_length" if full else True,
                return_tensors="pt",
            )
            batches.append({n: batch[n] for n in self.names if n in batch})
        return batches

    def packed(self, texts: list[str], shape: Shape, most: int) -> list[dict[str, Tensor]]:
        """Texts after each other, cut into full windows: how language models are calibrated.

        Too little text is repeated to fill one batch, and never more.
        """
        flat: list[int] = []
        for text in texts:
            flat += self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        need = shape.items * shape.tokens
        while flat and len(flat) < need:
            flat += flat
        if not flat:
            raise ConfigError("the tokenizer makes no tokens of the text", hint=OWN_FACTORY)
        count = min(most, len(flat) // need)
        ids = torch.tensor(flat[: count * need]).reshape(count, shape.items, shape.tokens)
        fill = {"attention_mask": 1, "token_type_ids": 0}
        return [
            {n: i if n == "input_ids" else torch.full_like(i, fill[n]) for n in self.names}
            for i in ids
        ]
