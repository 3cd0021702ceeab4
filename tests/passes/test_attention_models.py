"""Attention of models as they are: exported, rewritten, and the same as before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from zoo import ATTENTION, run

from structc import ops
from structc.inputs import to_call
from structc.passes.capture import capture
from structc.passes.detect import detect
from structc.passes.rewrite import rewrite
from structc.passes.rewrite_attention import OPERATOR


def floating(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


@pytest.mark.parametrize("name", ATTENTION)
def test_models_compute_the_same(name: str) -> None:
    """At the example's sizes and at others; every attention on the operator."""
    case, proven = ATTENTION[name]
    model = case.model()
    captured = capture(model, to_call(case.call()))
    sites = detect(captured)
    assert tuple(a.proven for a in sites.attention) == proven
    assert not any(a.refusal for a in sites.attention)
    able = tuple(replace(a, kernel="structc") for a in sites.attention)
    product = rewrite(captured, replace(sites, attention=able), {})
    graph = product.runners[0].region.graph.graph
    assert len(graph.find_nodes(op="call_function", target=OPERATOR)) == len(proven)
    with torch.no_grad():
        for sizes in ((2, 7), (3, 30)):
            calls = ops.call_count()
            got = floating(run(product.tree, case.call(*sizes)))
            assert ops.call_count() == calls + len(proven), "it ran elsewhere"
            want = floating(run(model, case.call(*sizes)))
            assert len(got) == len(want) > 0
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
