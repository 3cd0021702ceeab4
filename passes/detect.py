"""Stage 2, detect: every dense linear map with constant weights, in any spelling, as a site."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import Tensor, nn

from structc.attention_records import AttentionSite
from structc.passes.detect_attention import attention_sites
from structc.passes.linear_uses import TRANSPOSES, Use, full_name, linear_uses
from structc.passes.windows import convolution_sites
from structc.records import Captured, LinearSite, NodeRef, Refusal, Sites

aten = torch.ops.aten


@dataclass
class Found:
    """What is gathered about one weight before it becomes a site."""

    uses: list[Use] = field(default_factory=list)
    module: str = ""


def detect(captured: Captured) -> Sites:
    """Find the sites of a captured model.

    rewrite:      none; this stage only reads.
    Sound because: a product counts only if its weight operand is a parameter itself, or a
        transposed view of one; anything computed from parameters is left alone.
    Skips when:   the leaf has hooks, parametrizations or a ``forward`` of its own; the weight is
        not floating point; no example call reaches it; one weight is used in two orientations or
        with two biases; scripted code reads it. Each skip is a :class:`Refusal`.
    """
    graphs = list(captured.regions)
    if captured.analysis is not None:
        graphs.append(captured.analysis)
    found: dict[str, Found] = defaultdict(Found)
    owners = _Owners(captured.tree)
    for region in graphs:
        for use in linear_uses(region):
            if owners.canonical(use):
                found[use.weight].uses.append(use)
    modules = dict(captured.tree.named_modules())
    refusals: list[Refusal] = []
    for name, module in modules.items():
        if is_linear_leaf(module):
            reason = _leaf_refusal(name, module, captured, found)
            if reason is None:
                found[f"{name}.weight"].module = name
            elif reason.code != "NOT_CALLED" or f"{name}.weight" not in found:
                refusals.append(reason)
                found.pop(f"{name}.weight", None)
    groups = _groups(found)
    runnable = {region.path for region in captured.regions}
    sites = [
        site
        for weight, item in found.items()
        if (site := _site(captured, weight, item, groups, runnable, refusals)) is not None
    ]
    order = {name: at for at, (name, _) in enumerate(captured.tree.named_parameters())}
    sites.sort(key=lambda s: order.get(s.weight, len(order)))
    attention = tuple(
        a
        for region in graphs
        for a in attention_sites(region, captured, runs=region is not captured.analysis)
    )
    unique: dict[str, AttentionSite] = {}
    for one in attention:
        if one.name not in unique or unique[one.name].case is None:
            unique[one.name] = one
    convolutions = list(convolution_sites(captured))
    refusals += [c for c in convolutions if isinstance(c, Refusal)]
    able = tuple(c for c in convolutions if isinstance(c, LinearSite))
    return Sites(tuple(sites), tuple(unique.values()), tuple(refusals), able)


# ---------------------------------------------------------------------------- leaves


def is_linear_leaf(module: nn.Module) -> bool:
    """nn.Linear, a subclass of it, or transformers' Conv1D (a linear layer stored transposed)."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def _leaf_refusal(
    name: str, module: nn.Module, captured: Captured, found: dict[str, Found]
) -> Refusal | None:
    def refuse(code: str, reason: str) -> Refusal:
        return Refusal(name, "detect", code, reason)

    if torch.nn.utils.parametrize.is_parametrized(module):
        return refuse("PARAMETRIZED", "its weight is computed by a parametrization; fold it first")
    weight = module._parameters.get("weight")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return refuse("QUANTIZED", "its weight is not a plain matrix parameter")
    if type(weight) not in (nn.Parameter, Tensor):
        return refuse("QUANTIZED", f"its weight is a {type(weight).__name__}, not a plain tensor")
    if not weight.is_floating_point() or weight.element_size() < 2:
        return refuse("DTYPE", f"its weight is {weight.dtype}")
    if module._forward_hooks or module._forward_pre_hooks:
        return refuse("HOOKS", "it has forward hooks, which a rewritten layer would not honour")
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return refuse("SUBCLASS", f"{type(module).__name__} has a forward of its own")
    if name not in captured.leaf_rows:
        return refuse("NOT_CALLED", "the example call does not reach it")
    return None


class _Owners:
    """Which parameter a name in a graph stands for.

    Export keeps one name of a parameter that has several. The layer whose code the product stands
    in tells tied layers apart; a layer that the model has at two places counts at the first.
    """

    def __init__(self, tree: nn.Module) -> None:
        first = {id(m): name for name, m in tree.named_modules()}
        every = list(tree.named_modules(remove_duplicate=False))
        self.leaves = {name: first[id(m)] for name, m in every if is_linear_leaf(m)}
        self.ids = {n: id(p) for n, p in tree.named_parameters(remove_duplicate=False)}
        self.names = {id(p): n for n, p in tree.named_parameters()}

    def canonical(self, use: Use) -> bool:
        """Give a use the names that sites have; False if its operands are no parameters."""
        if use.weight not in self.ids or (use.bias is not None and use.bias not in self.ids):
            return False  # a constant in the code, or a buffer that may change
        weight = self.ids[use.weight]
        leaf = f"{self.leaves.get(use.leaf, '')}.weight"
        use.weight = leaf if self.ids.get(leaf) == weight else self.names[weight]
        if use.bias is not None:
            use.bias = self.names[self.ids[use.bias]]
        return True


# ---------------------------------------------------------------------------- sites


def _groups(found: dict[str, Found]) -> dict[str, str]:
    """weight -> name of the input that it shares, from the dataflow between inputs and weights."""
    flow = nx.Graph()
    for weight, item in found.items():
        flow.add_node(("weight", weight))
        for use in item.uses:
            flow.add_edge(("input", use.source), ("weight", weight))
    groups: dict[str, str] = {}
    for part in nx.connected_components(flow):
        weights = sorted(name for kind, name in part if kind == "weight")
        groups.update(dict.fromkeys(weights, weights[0]))
    return groups


def _site(
    captured: Captured,
    weight: str,
    item: Found,
    groups: dict[str, str],
    runnable: set[str],
    refusals: list[Refusal],
) -> LinearSite | None:
    uses = [u for u in item.uses if u.ref.region in runnable and not _analysis_only(captured, u)]
    module = captured.tree.get_submodule(item.module) if item.module else None
    if module is None and not uses:
        if item.uses:
            refusals.append(
                Refusal(weight, "detect", "NO_REGION", "it is used outside of any exported region")
            )
        return None
    owner = captured.tree.get_submodule(weight.rpartition(".")[0])
    if module is None and isinstance(owner, torch.jit.ScriptModule):
        reason = "scripted code reads it, which cannot be made to read factors"
        refusals.append(Refusal(weight, "detect", "SCRIPTED", reason))
        return None
    tensor = operator.attrgetter(weight)(captured.tree)
    if not bool(torch.isfinite(tensor).all()):
        reason = "its weight holds a NaN or an infinity, which no fit can be near"
        refusals.append(Refusal(item.module or weight, "detect", "NONFINITE", reason))
        return None
    transposed = item.uses[0].transposed if module is None else _is_conv1d(module)
    m, n = tensor.shape[::-1] if transposed else tensor.shape
    bias = item.uses[0].bias if module is None else _own_bias(captured.tree, module)
    if any((u.transposed, u.bias) != (transposed, bias) for u in item.uses):
        reason = f"its {len(item.uses)} uses differ in orientation or bias"
        refusals.append(Refusal(item.module or weight, "detect", "MIXED", reason))
        return None
    tied = _tied(captured.tree, weight, tensor)
    alone = module is not None or tied  # a tied weight stays dense
    read = "" if alone else _read_elsewhere(captured, weight, bias, uses)
    if read:
        refusals.append(Refusal(weight, "detect", "READ", f"{read} is read by other code too"))
        return None
    if module is None and bias and bias.rpartition(".")[0] != weight.rpartition(".")[0]:
        refusals.append(Refusal(weight, "detect", "BIAS", "its bias lives in another module"))
        return None
    activations = {u.activation for u in uses}
    tags = set()
    if module is None:
        tags.add("functional")
    if transposed:
        tags.add("transposed")
    if tied:
        tags.add("tied")
    rows = captured.leaf_rows.get(item.module, 0) or max((u.rows for u in uses), default=1)
    return LinearSite(
        name=item.module or weight,
        module=item.module,
        weight=weight,
        bias=bias,
        in_features=n,
        out_features=m,
        transposed=transposed,
        nodes=tuple(u.ref for u in uses),
        activation=activations.pop() if len(activations) == 1 else "",
        rows=max(rows, 1),
        dtype=tensor.dtype,
        group=groups.get(weight, weight),
        tags=frozenset(tags),
    )


def _analysis_only(captured: Captured, use: Use) -> bool:
    """Whether the use was read in the analysis graph; a region of the same path never exists."""
    return use.ref.region == "" and all(r.path != "" for r in captured.regions)


def _read_elsewhere(captured: Captured, weight: str, bias: str | None, uses: Sequence[Use]) -> str:
    """A tensor of a product without a module that something beside the product reads, or ``""``.

    Factors take its place: what else is computed from it would be computed from another matrix.
    """
    every = list(captured.tree.named_parameters(remove_duplicate=False))
    for name in (n for n in (weight, bias) if n is not None):
        tensor = operator.attrgetter(name)(captured.tree)
        aliases = [n for n, other in every if other is tensor and n != name]
        if aliases:
            return aliases[0]
        own = {use.ref for use in uses}
        for region in captured.regions:
            for node in region.graph.graph.find_nodes(op="get_attr"):
                if full_name(region, str(node.target)) != name:
                    continue
                if any(NodeRef(region.path, u.name) not in own for u in _final_readers(node)):
                    return name
    return ""


def _final_readers(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """What reads a constant, through transpositions."""
    for user in node.users:
        if user.target in TRANSPOSES:
            yield from _final_readers(user)
        else:
            yield user


def _own_bias(tree: nn.Module, module: nn.Module) -> str | None:
    bias = module._parameters.get("bias")
    return next((n for n, p in tree.named_parameters() if p is bias), None)


def _tied(tree: nn.Module, weight: str, tensor: Tensor) -> bool:
    """Whether another parameter name or module leads to the same storage."""
    pointer = tensor.untyped_storage().data_ptr()
    if not pointer:
        return False
    for name, other in tree.named_parameters(remove_duplicate=False):
        if name != weight and other.untyped_storage().data_ptr() == pointer:
            same_module = tree.get_submodule(name.rpartition(".")[0])
            if same_module is not tree.get_submodule(weight.rpartition(".")[0]):
                return True
    return False
