"""The parts of a chain one after the other: what its one kernel has to beat."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from structc import ops
from structc.forms import Add, Form, PackedDense, Tile, parse_form
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
    products = form.products()

    def run(x: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Tensor:
        left, inputs = list(weights), [x, *others]
        for (product, behind), (whole, kernel) in zip(products, kernels, strict=True):
            own, left = left[: product.weights], left[product.weights :]
            if isinstance(whole, PackedDense):
                own[0] = own[0].reshape(whole.out_features, whole.in_features)
            x = kernel(x, own)
            for step in behind:
                taken, left = left[: step.weights], left[step.weights :]
                if isinstance(step, Add):
                    x = x + inputs[step.index]
                elif step.kind == "layer":
                    x = F.layer_norm(x, (step.n,), taken[0], taken[1], float(step.eps))
                else:
                    x = F.rms_norm(x, (step.n,), taken[0], float(step.eps))
        return x

    return run
