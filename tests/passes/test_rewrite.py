"""Rewrites: golden graphs before and after, what is refused, and that the operators really run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import ZOO, Case, floats, run, sequential

from structc import ops
from structc.families import BY_NAME, AbstractFamily, Dense, LowRank
from structc.inputs import to_call
from structc.numerics import output_error
from structc.passes.capture import capture
from structc.passes.detect import detect
from structc.passes.fit import materialise
from structc.passes.objective import Objectives
from structc.passes.rewrite import FACTORS, Product, rewrite
from structc.records import Captured, Refusal, Sites

Golden = Callable[[str, str], None]


def captured_sites(model: nn.Module, inputs: Any) -> tuple[Captured, Sites]:
    captured = capture(model.eval(), to_call(inputs))
    return captured, detect(captured)


@functools.cache
def captured_case(name: str) -> tuple[nn.Module, Captured, Sites]:
    """Exports take seconds, and rewriting leaves them as they are: one serves all families."""
    model = ZOO[name].model()
    return model, *captured_sites(model, ZOO[name].call())


def rewritten(model: nn.Module, inputs: Any, **choices: Any) -> tuple[Captured, Product]:
    """Rewrite every site: dense, low rank (full or given), or Monarch on a 2 x 2 grid."""
    captured, sites = captured_sites(model, inputs)
    return captured, rewritten_sites(captured, sites, **choices)


def rewritten_sites(captured: Captured, sites: Sites, **choices: Any) -> Product:
    modules = {}
    for site in sites.linear:
        family = choices.get(site.name, choices.get("default", "dense"))
        if family is None:
            continue
        full = min(site.in_features, site.out_features)
        hyper = {
            "dense": {},
            "low_rank": {"rank": choices.get("rank", full)},
            "monarch": {"in_blocks": 2, "out_blocks": 2, "rank": full // 2},
        }[family]
        made = materialise(Objectives(captured, None), site, family, hyper)
        assert not isinstance(made, Refusal), made.reason
        modules[site.name] = made
    return rewrite(captured, sites, modules)


def graph_text(graph: torch.fx.Graph) -> str:
    """One line a node, names as they are, without counts of users."""
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
        elif node.op == "call_function":
            named = [f"{k}={v}" for k, v in node.kwargs.items()]
            arguments = ", ".join([*(map(str, node.args)), *named])
            target = str(node.target)
            target = "getitem" if "getitem" in target else target
            lines.append(f"{node.name} = {target}({arguments})")
        else:
            lines.append(f"{node.name} = {node.op} {node.target}")
    return "\n".join(lines) + "\n"


def both_graphs(captured: Captured, product: Product) -> str:
    (runner,) = product.runners
    before = graph_text(captured.regions[0].graph.graph)
    return f"# before\n{before}\n# after\n{graph_text(runner.region.graph.graph)}"


def calls_during(f: Callable[[], Any]) -> tuple[int, Any]:
    before = ops.call_count()
    value = f()
    return ops.call_count() - before, value


# ---------------------------------------------------------------------------- golden graphs


@pytest.mark.parametrize("family", ["dense", "low_rank", "monarch"])
def test_linear_gelu_linear(family: str, golden: Golden) -> None:
    model = sequential()
    captured, product = rewritten(model, floats(6, 12), default=family)
    golden(f"rewrite/linear-gelu-linear-{family}.txt", both_graphs(captured, product))
    with torch.no_grad():
        count, y = calls_during(lambda: product.tree(floats(5, 12)))
        assert count == 2 and output_error(y, model(floats(5, 12))) < 1e-5


def test_bert_layer(golden: Golden) -> None:
    case = ZOO["bert"]
    model = case.model()
    captured, product = rewritten(
        model,
        case.call(),
        **{
            "encoder.layer.0.intermediate.dense": "low_rank",
            "encoder.layer.0.output.dense": "monarch",
            "pooler.dense": None,
        },
    )
    golden("rewrite/bert-layer.txt", both_graphs(captured, product))
    with torch.no_grad():
        count, y = calls_during(lambda: run(product.tree, case.call(3, 9)))
        assert count == 6 and output_error(y, run(model, case.call(3, 9))) < 1e-5


# ---------------------------------------------------------------------------- equality


@pytest.mark.parametrize("family", ["dense", "low_rank", "monarch"])
@pytest.mark.parametrize("name", ["functional", "encoder", "branches", "gpt2", "llama", "vit"])
def test_exact_rewrites_leave_every_output(name: str, family: str) -> None:
    """Full rank and full block rank are the matrix itself: graph and tree must both agree."""
    case: Case = ZOO[name]
    model, captured, sites = captured_case(name)
    odd = {s.name: "dense" for s in sites.linear if s.in_features % 2 or s.out_features % 2}
    product = rewritten_sites(captured, sites, default=family, **odd)
    for runner in product.runners:
        runner.region.graph.graph.lint()
    functional = sum("functional" in s.tags for s in sites.linear)
    for size in (case.example, *case.sizes[:2]):
        for active in (True, False):
            for runner in product.runners:
                runner.active = active
            with torch.no_grad():
                count, got = calls_during(lambda s=size: run(product.tree, case.call(*s)))
                assert output_error(got, run(model, case.call(*size))) < 2e-5, (size, active)
            if active:
                assert count >= len(sites.linear) - functional or name == "branches"


def test_low_rank_moves_graph_and_tree_alike() -> None:
    model = ZOO["bert"].model()
    _, product = rewritten(model, ZOO["bert"].call(), default="low_rank", rank=5)
    inputs, (runner,) = ZOO["bert"].call(3, 6), product.runners
    with torch.no_grad():
        of_graph = run(product.tree, inputs)
        runner.active = False
        of_tree = run(product.tree, inputs)
        assert output_error(of_graph, of_tree) < 1e-5
        assert output_error(of_graph, run(model, inputs)) > 1e-2


def test_a_shared_layer_is_replaced_at_all_its_places() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    _, product = rewritten(model, floats(4, 6), default="low_rank")
    assert product.tree[0] is product.tree[2] and isinstance(product.tree[0], LowRank)
    with torch.no_grad():
        count, y = calls_during(lambda: product.tree(floats(3, 6)))
    assert count == 2 and output_error(y, model(floats(3, 6))) < 1e-5


def test_two_layers_with_one_weight_keep_their_biases() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    model = Pair()
    _, product = rewritten(model, floats(4, 6))
    assert product.tree.a.weight is product.tree.b.weight is model.a.weight
    with torch.no_grad():
        assert output_error(product.tree(floats(3, 6)), model(floats(3, 6))) < 1e-6


def test_the_model_is_left_as_it_was() -> None:
    case = ZOO["encoder"]
    model = case.model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    types = {n: type(m) for n, m in model.named_modules()}
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    rewritten(model, case.call(), default="low_rank", rank=3)
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------------------- where things live


def test_functional_factors_live_in_the_product() -> None:
    model = ZOO["functional"].model()
    captured, product = rewritten(model, floats(2, 5, 12), default="low_rank", rank=3)
    names = dict(product.tree.named_parameters())
    assert {f"{FACTORS}{w}.{p}" for w in "abc" for p in "uv"} <= set(names)
    assert not {"a", "b", "c"} & set(names), "the dense weights are gone"
    for owner in (model, captured.tree):
        assert {"a", "b", "c"} <= set(dict(owner.named_parameters()))
        assert not any(n.startswith(FACTORS) for n, _ in owner.named_modules())
    clone = {k: v.clone() for k, v in product.tree.state_dict().items()}
    x = floats(2, 5, 12)
    with torch.no_grad():
        before = product.tree(x)
        for name, parameter in product.tree.named_parameters():
            if name.startswith(FACTORS):
                parameter.zero_()
        assert not torch.allclose(product.tree(x), before), "the graph reads the factors"
        product.tree.load_state_dict(clone)
        assert torch.equal(product.tree(x), before)


@pytest.mark.parametrize("name", ["functional", "encoder"])
def test_graph_and_tree_are_one_function_of_one_set_of_parameters(name: str) -> None:
    """Weights that user code reads itself: what gradients train is what inference runs."""
    case = ZOO[name]
    model = case.model()
    _, product = rewritten(model, case.call(), default="low_rank", rank=3)
    tree, again = product.tree, copy.deepcopy(product.tree)
    for step in range(2):
        for twin in (tree, again):
            with torch.no_grad():
                graph = twin(*case.call())
            module = twin(*case.call())
            torch.testing.assert_close(graph, module.detach(), rtol=1e-4, atol=1e-5)
        loss = tree(*case.call()).square().sum()
        found = torch.autograd.grad(loss, list(tree.parameters()), allow_unused=True)
        unused = [n for (n, _), g in zip(tree.named_parameters(), found, strict=True) if g is None]
        assert not unused, f"step {step}: {unused}"
        with torch.no_grad():
            for parameter, grad in zip(tree.parameters(), found, strict=True):
                parameter -= 1e-3 * grad
            again.load_state_dict(tree.state_dict())


def test_biases_of_two_products_stay_whole() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(floats(8, 6)), nn.Parameter(floats(8, 8))
            self.c = nn.Parameter(floats(8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.a, self.c), self.b, self.c)

    _, sites = captured_sites(Shared(), floats(3, 6))
    assert sites.linear == () and {r.code for r in sites.refusals} == {"READ"}


def test_untouched_parameters_are_shared_and_replaced_ones_are_gone() -> None:
    model = ZOO["bert"].model()
    _, product = rewritten(
        model, ZOO["bert"].call(), **{"default": None, "pooler.dense": "low_rank"}
    )
    own, theirs = dict(product.tree.named_parameters()), dict(model.named_parameters())
    assert set(theirs) - set(own) == {"pooler.dense.weight"}
    assert set(own) - set(theirs) == {"pooler.dense.u", "pooler.dense.v"}
    shared = (set(own) & set(theirs)) - {"pooler.dense.bias"}
    assert all(own[n] is theirs[n] for n in shared)
    assert own["pooler.dense.bias"] is not theirs["pooler.dense.bias"]


def test_dense_rewrites_share_the_users_weight() -> None:
    model = sequential()
    _, product = rewritten(model, floats(4, 12))
    assert isinstance(product.tree[0], Dense)
    assert product.tree[0].weight is model[0].weight and product.tree[0].bias is model[0].bias


# ---------------------------------------------------------------------------- refusals


class Reader(nn.Module):
    """A linear layer and an activation, with more between or beside them."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.f = nn.Linear(12, 20), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.up(x))


FUSED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gelu": (F.gelu, True),
    "gelu-tanh": (lambda y: F.gelu(y, approximate="tanh"), True),
    "silu": (F.silu, True),
    "relu-of-reshaped": (lambda y: F.relu(y.reshape(-1, 4, 5)), True),
    "two-readers": (lambda y: F.gelu(y) + y, False),
    "two-activations": (lambda y: F.gelu(y) + F.relu(y), False),
    "something-between": (lambda y: F.gelu(y * 2), False),
    "another-activation": (torch.tanh, False),
    "leaky": (F.leaky_relu, False),
    "relu-of-transposed": (lambda y: F.relu(y.mT), False),
}


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED.keys())
@pytest.mark.parametrize("family", ["dense", "low_rank"])
def test_an_activation_is_fused_only_where_nobody_else_reads(case: Any, family: str) -> None:
    f, fused = case
    model = Reader(f)
    _, product = rewritten(model, floats(6, 12), default=family)
    left = graph_text(product.runners[0].region.graph.graph)
    kept = sum(f"aten.{a}" in left for a in ("gelu", "relu", "silu", "tanh", "leaky_relu"))
    assert (kept == 0) == fused
    with torch.no_grad():
        assert output_error(product.tree(floats(6, 12)), model(floats(6, 12))) < 1e-5


def test_a_product_whose_result_is_also_returned_keeps_its_activation() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(12, 20)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.up(x)
            return y, F.gelu(y)

    model = Both()
    _, product = rewritten(model, floats(6, 12))
    with torch.no_grad():
        assert output_error(product.tree(floats(6, 12)), model(floats(6, 12))) < 1e-6


def test_sites_without_a_module_to_put_in_are_left() -> None:
    model = ZOO["bert"].model()
    captured, product = rewritten(model, ZOO["bert"].call(), default=None)
    assert product.replaced == {}
    assert graph_text(product.runners[0].region.graph.graph) == graph_text(
        captured.regions[0].graph.graph
    )


def test_a_bias_takes_up_the_mean_error() -> None:
    """b' = b + (W - M) E[x]: on inputs that never vary, a rank-1 layer is exact."""
    from structc.passes.calibrate import calibrate
    from structc.workdir import WorkDir

    model, x = nn.Sequential(nn.Linear(12, 20)), floats(1, 12).expand(64, 12).contiguous()
    captured, sites = captured_sites(model, x)
    profile = calibrate(captured, sites, [to_call(x)], work=WorkDir(None, {}), memory_mb=64)
    made = materialise(Objectives(captured, profile), sites.linear[0], "low_rank", {"rank": 1})
    assert isinstance(made, AbstractFamily)
    with torch.no_grad():
        assert output_error(made(x), model(x)) < 1e-5
    assert made.bias is not None and not torch.equal(made.bias, model[0].bias)


def test_factors_want_a_gradient_where_the_weight_did() -> None:
    model = sequential()
    model[0].weight.requires_grad_(False)
    captured, sites = captured_sites(model, floats(4, 12))
    for site, wanted in zip(sites.linear, (False, True)):
        for family, kind in BY_NAME.items():
            for hyper in kind.proposals(site.in_features, site.out_features)[-1:]:
                made = materialise(Objectives(captured, None), site, family, hyper)
                assert isinstance(made, AbstractFamily)
                factors = [f for f in made.factors() if f.is_floating_point()]
                assert {f.requires_grad for f in factors} == {wanted}


class ReadTwice(nn.Module):
    """A weight that a product and something else read, and one with two names."""

    def __init__(self, alias: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(floats(8, 8)), nn.Parameter(floats(8, 8) + 1)
        if alias:
            self.b = self.a
        self.alias = alias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.a)
        return F.linear(y.relu(), self.b) if self.alias else y / self.a.norm(dim=1)


@pytest.mark.parametrize("alias", [False, True])
def test_weights_that_other_code_reads_stay(alias: bool) -> None:
    _, sites = captured_sites(ReadTwice(alias), floats(3, 8))
    assert sites.linear == () and {r.code for r in sites.refusals} == {"READ"}
