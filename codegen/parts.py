"""The parts of a chain one after the other: what its one kernel has to beat."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from structc import ops, reference
from structc.forms import Form, PackedDense, Tile, parse_form
from structc.records import Refusal

Make = Callable[[Form, str, Mapping[str, int | str]], ops.Kernel | Refusal]


def make(form: Tile, config: Mapping[str, int | str], make_one: Make) -> ops.Kernel | Refusal:
    """A kernel for the whole chain made of one for each product.

    Args:
        form: the chain.
        config: ``kernels`` is JSON: for each product its form, kernel and configuration.
        make_one: makes the kernel of one product.
    """
    kernels: list[tuple[Form, ops.Kernel]] = []
    for text, kernel, settings in json.loads(str(config["kernels"])):
        whole = parse_form(text)
        made = make_one(whole, kernel, settings)
        if isinstance(made, Refusal):
            return made
        kernels.append((whole, made))
    pieces = form.pieces()

    def run(x: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Tensor:
        left, products = list(weights), iter(kernels)
        slots = dict(enumerate([x, *others]))
        for piece in pieces:
            own, left = left[: piece.weights], left[piece.weights :]
            if isinstance(piece, Tile):
                whole, kernel = next(products)
                if isinstance(whole, PackedDense):
                    own[0] = _matrix(own[0], whole)
                x = kernel(x, own)
            else:
                x = reference.apply_step(piece, x, iter(own), slots)
        return x

    return run


def _matrix(weight: Tensor, whole: PackedDense) -> Tensor:
    """A block's weight as a matrix, the same tensor at each call: it is packed once."""
    shape = whole.out_features, whole.in_features
    made: Tensor = ops.derived([weight], f"matrix{shape}", lambda w: w[0].reshape(shape))
    return made
