"""Exact softmax attention: what the mask hides is skipped, and no matrix of all scores is built."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from structc.attend import attention
from structc.errors import ConfigError
from structc.softmax import NOTHING, Extras, Softmax


class Masks(TypedDict, total=False):
    """What :func:`exact` takes beside q, k and v; what each means stands there."""

    is_causal: bool
    causal_offset: int
    window: int | None
    sinks: int
    key_lengths: Tensor | None
    block_mask: tuple[Tensor, int | tuple[int, int]] | None
    bias: Tensor | None
    scale: float | None
    softcap: float | None
    sink_logits: Tensor | None
    enable_gqa: bool


@overload
def exact(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **masks: Unpack[Masks]
) -> Tensor: ...
@overload
def exact(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **masks: Unpack[Masks]
) -> tuple[Tensor, Tensor]: ...
def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    causal_offset: int = 0,
    window: int | None = None,
    sinks: int = 0,
    key_lengths: Tensor | None = None,
    block_mask: tuple[Tensor, int | tuple[int, int]] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``o_i = sum_j p_ij v_j``, ``p_ij = exp(s_ij) / sum_j exp(s_ij)``, ``s = scale q k^T + bias``.

    Everything that hides keys may be combined: key j of query i is seen where all of it allows it.
    Work is done for the keys that some query of a tile sees; memory is that of the inputs.

    Args:
        q: ``(B, H, n_q, d)``; k: ``(B, H, n_k, d)``; v: ``(B, H, n_k, d_v)``; with ``enable_gqa`` k
            and v may have fewer heads, each for ``H / H_kv`` neighbouring heads of q.
        is_causal: ``j <= i + causal_offset``. Lengths that differ are aligned top-left, as in
            PyTorch; ``causal_offset = n_k - n_q`` aligns them bottom-right, as a cache wants it.
        window: keys within ``window`` of the query, ``i - window < j`` (and ``j < i + window``
            unless causal), i shifted by ``causal_offset``.
        sinks: so many first keys are seen from outside the window too.
        key_lengths: ``(B,)`` whole numbers; keys from there on are padding. What stands there may
            be anything, NaN too.
        block_mask: boolean ``(B|1, H|1, blocks of queries, blocks of keys)`` and the size of a
            block, one number or (queries, keys).
        bias: added to the scores. Shaped like a mask, ``(B|1, H|1, n_q|1, n_k|1)`` or without the
            first dimensions (boolean: True where a key is seen); or one value a lag, ``(n_q + n_k -
            1,)`` or ``(H, n_q + n_k - 1)``: query i and key j get the value at ``i - j + n_k - 1``
            (ALiBi, T5).
        scale: ``1 / sqrt(d)`` if None.
        softcap: c: scores s become ``c tanh(s / c)`` before biases and masks (Gemma 2).
        sink_logits: ``(H,)``, one more score in each row that meets no value (GPT-OSS); zeros give
            ``exp(s) / (1 + sum exp(s))``.
        enable_gqa: as above.
        return_lse: give also ``log sum_j exp(s_ij)``, ``(B, H, n_q)``, in float32 or float64.

    Returns:
        ``(B, H, n_q, d_v)``, heads side by side in memory; a query that sees no key gives 0, and
        -inf.

    Cost:    ``2 (d + d_v)`` flops for each pair of query and key inside a live block of 48 x 64.
    Errors:  :class:`ConfigError` for shapes, dtypes or values that do not fit.
    Source:  online softmax, Milakov and Gimelshein 2018; tiles, Dao et al. 2022 (FlashAttention).

    >>> q, k, v = torch.randn(3, 1, 2, 100, 16).unbind(0)
    >>> y = exact(q, k, v, is_causal=True, window=10, sinks=2)
    >>> lag = torch.arange(100)[:, None] - torch.arange(100)
    >>> seen = (lag >= 0) & ((lag < 10) | (torch.arange(100) < 2))
    >>> want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    >>> torch.allclose(y, want, atol=1e-5)
    True
    """
    check_qkv(q, k, v, grouped=enable_gqa)
    _check_rule(is_causal, causal_offset, window, sinks)
    n, m = q.shape[2], k.shape[2]
    bias, lags = _bias(bias, q, m)
    blocks, size = _blocks(block_mask, q, m)
    form = Softmax(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=is_causal,
        offset=causal_offset,
        window=min(window or 0, n + m + abs(causal_offset)),
        sinks=min(sinks, m),
        softcap=0.0 if softcap is None else float(softcap),
        block_q=size[0],
        block_k=size[1],
    )
    keys = _keys(key_lengths, q, m)
    given = (bias, lags, keys, blocks, _sink(sink_logits, q))
    extras = NOTHING if all(t is None for t in given) else Extras(*given)
    o, lse = attention(q, k, v, form, extras)
    return (o, lse) if return_lse else o


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, grouped: bool = False) -> None:
    """Refuse what no attention can be made of.

    Errors: :class:`ConfigError` that says which of the three does not fit, and to what.
    """
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ConfigError(
            f"attention takes (batch, heads, length, head_dim) tensors, got {_shapes(q, k, v)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        dtypes = ", ".join(str(t.dtype) for t in (q, k, v))
        raise ConfigError(f"attention takes q, k and v in one floating dtype, got {dtypes}")
    if q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ConfigError(f"attention: batch, lengths or head_dim do not agree: {_shapes(q, k, v)}")
    h, g = q.shape[1], k.shape[1]
    if h != g and not grouped:
        raise ConfigError(
            f"attention: {h} heads of q and {g} of k",
            hint="exact takes enable_gqa=True; methods want k and v repeated for each head of q",
        )
    if h != g and (g == 0 or h % g):
        raise ConfigError(f"attention: {h} heads of q cannot share {g} heads of k evenly")
    if q.shape[-1] == 0:
        raise ConfigError(f"attention: head_dim is 0: {_shapes(q, k, v)}")


def _check_rule(is_causal: bool, causal_offset: int, window: int | None, sinks: int) -> None:
    if window is not None and window < 1:
        raise ConfigError(f"exact: window = {window}, but a query sees at least itself, 1")
    if sinks and window is None:
        raise ConfigError(
            "exact: sinks are keys seen from outside a window, but there is no window"
        )
    if sinks < 0:
        raise ConfigError(f"exact: sinks = {sinks} is no number of keys")
    if causal_offset and not (is_causal or window):
        raise ConfigError("exact: causal_offset shifts a causal mask or a window; there is neither")


def _sink(sink_logits: Tensor | None, q: Tensor) -> Tensor | None:
    if sink_logits is not None and sink_logits.shape != (q.shape[1],):
        shape = tuple(sink_logits.shape)
        raise ConfigError(f"exact: sink_logits of {shape}, expected one a head: ({q.shape[1]},)")
    return sink_logits


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip("qkv", tensors, strict=True))


def _bias(bias: Tensor | None, q: Tensor, m: int) -> tuple[Tensor | None, Tensor | None]:
    """As a mask, or as one value a lag."""
    if bias is None:
        return None, None
    b, h, n, _ = q.shape
    shape, lags = tuple(bias.shape), n + m - 1
    if shape == (lags,) and lags == m > 1:
        raise ConfigError(
            f"exact: with one query a bias of {shape} may be a value a key or a value a lag",
            hint=f"pass ({1}, {m}) for keys, ({h}, {lags}) for lags",
        )
    if shape == (lags,) or (shape in ((h, lags), (1, lags)) and shape != (n, m)):
        if not bias.is_floating_point():
            raise ConfigError(f"exact: values of lags are {bias.dtype}, expected floating")
        return None, bias.reshape(-1, lags)
    wide, want = _four(bias), (b, h, n, m)
    if wide.dim() != 4 or any(s not in (1, w) for s, w in zip(wide.shape, want, strict=True)):
        raise ConfigError(
            f"exact: bias of {shape} is neither a mask of {want} nor one value for each of "
            f"{lags} lags"
        )
    if wide.dtype != torch.bool and not wide.is_floating_point():
        raise ConfigError(f"exact: bias is {wide.dtype}, expected boolean or floating")
    return wide, None


def _keys(key_lengths: Tensor | None, q: Tensor, m: int) -> Tensor | None:
    if key_lengths is None:
        return None
    lengths = torch.as_tensor(key_lengths, device=q.device)
    whole = not (lengths.is_floating_point() or lengths.dtype == torch.bool)
    if lengths.shape != (q.shape[0],) or not whole:
        raise ConfigError(
            f"exact: key_lengths is {lengths.dtype} {tuple(lengths.shape)}, expected one whole "
            f"number for each of {q.shape[0]} sequences"
        )
    if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > m):
        raise ConfigError(f"exact: key_lengths reach outside 0..{m}: {lengths.tolist()}")
    return torch.arange(m, device=q.device)[None] < lengths[:, None]


def _blocks(
    block_mask: tuple[Tensor, int | tuple[int, int]] | None, q: Tensor, m: int
) -> tuple[Tensor | None, tuple[int, int]]:
    if block_mask is None:
        return None, (0, 0)
    if not (isinstance(block_mask, tuple) and len(block_mask) == 2):
        raise ConfigError("exact: block_mask is (boolean blocks, size of a block)")
    blocks, size = block_mask
    high, wide = (size, size) if isinstance(size, int) else size
    if high < 1 or wide < 1:
        raise ConfigError(f"exact: blocks of {high} x {wide}")
    b, h, n, _ = q.shape
    want = (b, h, -(-n // high), -(-m // wide))
    full = _four(blocks)
    fits = full.dim() == 4 and full.shape[2:] == want[2:]
    fits = fits and all(s in (1, w) for s, w in zip(full.shape[:2], want[:2], strict=True))
    if not fits or full.dtype != torch.bool:
        raise ConfigError(
            f"exact: block_mask is {blocks.dtype} {tuple(blocks.shape)}, expected boolean {want} "
            f"for blocks of {high} x {wide}"
        )
    return full, (high, wide)


def _four(t: Tensor) -> Tensor:
    """With dimensions of size 1 in front, up to four."""
    return t.reshape((1,) * (4 - t.dim()) + tuple(t.shape)) if t.dim() < 4 else t
