"""The activations that products take in: their names, their graph operators, where one follows."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten
ATEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "relu": (aten.relu.default, {}),
    "silu": (aten.silu.default, {}),
}
"""Operator and keyword arguments of each activation that kernels fuse."""
_IN_PLACE: dict[Any, Any] = {aten.relu_.default: aten.relu.default}
_SAME_VALUES = (aten.view.default, aten.reshape.default)


def activation_of(node: torch.fx.Node) -> str:
    """The name of the activation that a node computes; ``""`` for anything else."""
    target = _IN_PLACE.get(node.target, node.target)
    given = {k: v for k, v in node.kwargs.items() if v != "none"}  # gelu's default, spelt out
    return next((name for name, known in ATEN.items() if known == (target, given)), "")


def following_activation(node: torch.fx.Node) -> torch.fx.Node | None:
    """The activation after a product if nothing else reads the product.

    Reshapes may stand between: GPT-2 has them between ``addmm`` and GELU.
    """
    while len(node.users) == 1:
        (node,) = node.users
        if activation_of(node):
            return node
        if node.target not in _SAME_VALUES:
            return None
    return None
