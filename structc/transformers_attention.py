"""Attention of models from transformers, by their own hook: ``AttentionInterface`` and its masks.

transformers lets a name stand for a function that computes attention, and one that makes its mask.
:data:`NAME` stands for the two functions here. The mask is the one that PyTorch's operator gets
there, with a description beside it of the rule that it was made from: what a mask is gets known
from how it was made, never from its values. What has no description, and every other call that is
not served, goes to transformers' own function for PyTorch's operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from structc import attend
from structc.softmax import NOTHING, Extras, Softmax

NAME = "structc"
MARK = "structc_attends"
"""Attribute of modules whose attention goes here; those without it keep transformers' own."""
IGNORED = frozenset(
    (
        "sliding_window",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "softcap",
        "position_bias",
        "cache",
    )
)
"""Arguments that the function for PyTorch's operator does not read, or not where they are None."""
_READ = ("output_attentions", "softcap", "position_bias", "cache")
_SEEN = "structc_seen"
SMALL = 3 << 16
"""Bytes of keys and values that PyTorch's operator is through with before Python is here."""


@dataclass(frozen=True)
class SeenBy:
    """The rule that a mask was made from: query i sees key j if ``t - window < j <= t``.

    Attributes:
        offset: ``t = i + offset``.
        window: 0 for none.
        keys: (B or 1, n_k) boolean: keys that are no padding; None if none are.
        version: the mask's, when it was made: writing to it raises it.
    """

    offset: int
    window: int
    keys: Tensor | None
    version: int


def register() -> None:
    """Let transformers know the name; what it knew before stays."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``structc::attention`` with the arguments of transformers' attention functions.

    Returns:
        The output ``(B, n_q, H, d_v)``, and no weights.

    Skips when: one query meets so few keys that PyTorch is as fast; a gradient is wanted, weights
        are dropped, something traces, the mask was made by someone else or written to since, or an
        argument is not known: then it is what transformers does for ``"sdpa"``.
    """
    known = MARK in module.__dict__ and not dropout and _known(kwargs)
    if known and _plain(query, key, value):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        found = _rule(query, key, attention_mask, scale, causal)
        if found is not None:
            o, _ = attend.attention(query, key, value, *found)
            return o.transpose(1, 2), None
    from transformers import AttentionInterface

    theirs: Callable[..., tuple[Tensor, Tensor | None]] = AttentionInterface()["sdpa"]
    return theirs(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


def _known(kwargs: dict[str, Any]) -> bool:
    if not kwargs.keys() <= IGNORED:
        return False
    given = [kwargs[name] for name in _READ if name in kwargs]
    return all(value is None or value is False for value in given)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are numbers on this machine that nobody traces or differentiates."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    if not (q.is_cpu and q.dim() == 4 and q.dtype == k.dtype == v.dtype):
        return False
    same = q.shape[0] == k.shape[0] and q.shape[1] % max(1, k.shape[1]) == 0
    return same and attend.kernel_for("cpu", q.dtype) is not None


def _rule(
    q: Tensor, k: Tensor, attention_mask: Tensor | None, scale: float, causal: Any
) -> tuple[Softmax, Extras] | None:
    """What a call computes, or None if its mask is not known."""
    n, m = q.shape[2], k.shape[2]
    if attention_mask is None:  # as PyTorch's operator: aligned at the first key
        tiny = n == 1 and q.dtype == torch.float32 and 2 * k.nbytes < SMALL
        if tiny or not isinstance(causal, bool):
            return None
        return Softmax(scale, causal=causal and n > 1), NOTHING
    seen = getattr(attention_mask, _SEEN, None)
    if not isinstance(seen, SeenBy) or seen.version != attention_mask._version:
        return None
    if attention_mask.shape[-2:] != (n, m) or attention_mask.shape[0] not in (1, q.shape[0]):
        return None
    form = Softmax(scale, causal=True, offset=seen.offset, window=seen.window)
    return form, NOTHING if seen.keys is None else Extras(keys=seen.keys)


# ---------------------------------------------------------------------------- masks


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that transformers makes for PyTorch's operator, which knows where it comes from."""
    from transformers import AttentionMaskInterface

    theirs = AttentionMaskInterface()["sdpa"]
    if args or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return theirs(*args, **kwargs)
    counted: Any = contextlib.nullcontext()
    if torch.is_inference_mode_enabled():  # where a tensor does not count what is written to it
        counted = torch.inference_mode(False)
    with counted:
        made = theirs(**kwargs)
        if made is not None and made.shape[-2] == 1:
            made = made.contiguous()  # generate() asks for that, and a copy would know nothing
        seen = None if made is None else _seen_by(made, **kwargs)
    if seen is not None:
        setattr(made, _SEEN, seen)
    return made


def _seen_by(
    made: Tensor,
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> SeenBy | None:
    """The description of a mask, if the function that it is made by is one that is known."""
    from transformers.masking_utils import causal_mask_function

    window = _window_of(causal_mask_function if mask_function is None else mask_function)
    if window is None or made.dtype != torch.bool or made.shape[-2:] != (q_length, kv_length):
        return None
    keys = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.dtype != torch.bool:
            return None
        missing = kv_length + kv_offset - attention_mask.shape[1]
        keys = nn.functional.pad(attention_mask, (0, max(0, missing)))
        keys = keys[:, kv_offset : kv_offset + kv_length].contiguous()
        keys = None if bool(keys.all()) else keys
    return SeenBy(int(q_offset) - int(kv_offset), window, keys, made._version)


def _window_of(function: Callable[..., Any]) -> int | None:
    """0 for transformers' causal rule, w for that within a window of w keys, None for others.

    A window is a closure: known by its code, and by what it holds.
    """
    from transformers import masking_utils as theirs

    if function is theirs.causal_mask_function:
        return 0
    both = _held(function, theirs.sliding_window_causal_mask_function(1).__code__)
    parts = list(both) if isinstance(both, tuple) else []
    if len(parts) != 2 or parts[1] is not theirs.causal_mask_function:
        return None
    window = _held(parts[0], theirs.sliding_window_overlay(1).__code__)
    return window if isinstance(window, int) and window > 0 else None


def _held(function: Callable[..., Any], code: CodeType) -> Any:
    """The one value that a closure of this code holds; None for other code."""
    cells = list(getattr(function, "__closure__", None) or ())
    if getattr(function, "__code__", None) is not code or len(cells) != 1:
        return None
    return cells[0].cell_contents
