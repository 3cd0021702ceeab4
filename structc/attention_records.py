"""The frozen records of attention: one op of a graph, and all that its time depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from structc.records import NodeRef, Price, Refusal

PER_HEAD = "per_head"
"""The family of a choice that lets heads of an attention take different methods."""


@dataclass(frozen=True)
class AttentionCase:
    """All that the time of one attention depends on, at the example's sizes.

    Attributes:
        form: text of the :class:`structc.softmax.Softmax` that computes it.
        batch, heads, kv_heads, queries, keys, head_dim, value_dim, dtype: of q, k and v.
        mask, mask_shape: ``"bool"`` or ``"float"`` and its sizes for a mask that is handed over as
            it is; ``""`` for none.
        padded: whether some keys are hidden from all queries.
        sink: whether each row has a score that meets no value.
        masked: whether the original is given a mask.
        repeated: whether the original repeats heads of keys for their groups.
        fused: whether the original is PyTorch's operator.
        torch_causal: PyTorch's flag, where its operator needs no mask for this; else None.
        lags: heads with a bias for each lag, which the original has for each query and key.
    """

    form: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    mask: str = ""
    mask_shape: tuple[int, ...] = ()
    padded: bool = False
    sink: bool = False
    masked: bool = False
    repeated: bool = False
    fused: bool = True
    torch_causal: bool | None = None
    lags: int = 0


@dataclass(frozen=True)
class HeadTrial:
    """One method on one head, against exact attention on calibration data.

    Attributes:
        method: as :func:`structc.attention.by_head.method_text` writes it.
        error: relative output error, the worse of what it was fitted on and of what confirms it.
        kl, tv: mean Kullback-Leibler divergence in nats and largest total variation of a row; NaN
            where the method's weights are no distribution.
        bound: what an output row may be off by, ``TV diam(V)``, in the values' units.
        speedup: over the exact kernel, at the example's length.
    """

    method: str
    error: float
    kl: float
    tv: float
    bound: float
    speedup: float


@dataclass(frozen=True)
class HeadRow:
    """One head of an attention: what the data say, what was tried, and why not the rest.

    Attributes:
        head: its number.
        numbers: of :class:`structc.attention.stats.HeadStats`.
        tried: methods whose error was measured.
        refused: methods that the numbers or the clock speak against.
    """

    head: int
    numbers: Mapping[str, float]
    tried: tuple[HeadTrial, ...] = ()
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class AttentionSite:
    """One attention op, in whatever spelling the graph has it.

    Attributes:
        name: the module that it belongs to.
        node: where the graph computes it.
        spelling: ``"sdpa"`` or ``"matmul_softmax_matmul"``.
        mask_kind: ``"none"``, ``"causal"``, ``"all_true"``, ``"padding"``, ``"data_dependent"``,
            ..., by its values at the example's sizes and at longer ones.
        scale: the factor on the scores, if it is constant.
        heads, kv_heads, head_dim, length: of the example inputs.
        proven: what the graph proves of its mask, at every length.
        rotary: whether queries and keys are rotated by their positions (RoPE); it stays as it is.
        nodes: everything between scores and output.
        case: what its time depends on; None if it is not rewritten.
        kernel: what computes it in the product: ``"structc"``, ``"torch"`` for PyTorch's operator
            without the mask, or ``""`` for the graph as it is.
        price: of the kernel, or of the best one where none was faster.
        refusal: why it stays as it is.
        levels: for each share of a head's output that may be lost, in thousandths, the groups of
            heads that take a method then (:func:`structc.attention.by_head.groups_of`).
        head_rows: what is known of each head, where calibration data reached it.
        by_head: the groups of the product; ``""`` where every head is exact.
        hooked: whether it is computed by the hook that the model's library offers, in no graph.
    """

    name: str
    node: NodeRef
    spelling: str
    mask_kind: str
    scale: float | None
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    proven: str = ""
    nodes: tuple[str, ...] = ()
    case: AttentionCase | None = None
    kernel: str = ""
    price: Price | None = None
    refusal: Refusal | None = None
    levels: Mapping[int, str] = field(default_factory=dict)
    head_rows: tuple[HeadRow, ...] = ()
    by_head: str = ""
    hooked: bool = False
    rotary: bool = False
