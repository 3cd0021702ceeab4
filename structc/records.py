"""The frozen records that travel between the ten stages.

Names are the field's; units are suffixes (``latency_ms``); errors are relative unless ``abs_``.
Records that hold tensors or graphs compare by identity (``eq=False``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from structc.attention_records import AttentionSite

Hyper = Mapping[str, Any]
"""What a family needs besides the weight, numbers and words: ``{"rank": 96}``; empty for dense."""


@dataclass(frozen=True)
class Refusal:
    """Why something was not done, as a value that reaches the report.

    Attributes:
        site: the site's name, or the submodule's path.
        family: the family, kernel or stage that refused.
        code: a short word for programs, ``"NONFINITE"``.
        reason: one sentence with numbers, for people.
    """

    site: str
    family: str
    code: str
    reason: str


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the model: what ``model(*args, **kwargs)`` is given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class DimGuard:
    """What one input tensor must look like for a region's graph to be valid.

    Attributes:
        where: the pytree path of the tensor among the inputs, for messages.
        dims: for each dimension either its fixed size or the name of its symbol.
        dtype: of the tensor.
        device: type of the tensor's device.
    """

    where: str
    dims: tuple[int | str, ...]
    dtype: torch.dtype
    device: str


@dataclass(frozen=True, eq=False)
class Guards:
    """When a region's graph may run in place of its submodule.

    Attributes:
        spec: the pytree structure of ``(args, kwargs)``.
        leaves: a guard for each tensor leaf, the value itself for any other leaf.
        ranges: for each symbol the smallest and largest size that the graph is valid for.
    """

    spec: Any
    leaves: tuple[Any, ...]
    ranges: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Region:
    """An exported graph that runs over the parameters of one submodule.

    Attributes:
        path: the submodule's name in the model, ``""`` for the model itself.
        graph: the FX graph module; its ``get_attr`` names are relative to the submodule.
        guards: when it may run.
        hash: of the graph as exported, to recognise it again after a reload.
        example: the submodule's call that it was exported from.
    """

    path: str
    graph: torch.fx.GraphModule
    guards: Guards
    hash: str
    example: Call


@dataclass(frozen=True)
class NodeRef:
    """A node of a region's graph, by names, so that it survives copies of the graph."""

    region: str
    node: str


@dataclass(frozen=True)
class Window:
    """What a convolution multiplies at each place: sizes, steps, zeros around; one a dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


@dataclass(frozen=True)
class LinearSite:
    """One dense linear map of the model with constant weight: ``y = x @ W.T + b``.

    Attributes:
        name: the module's name, or the weight's if no module is called for it.
        module: the name of the leaf module to replace; ``""`` for a weight used without one.
        weight: the parameter's name.
        bias: the parameter's name, if there is one that may be folded in.
        in_features, out_features: sizes of the map.
        transposed: whether the weight is stored ``(in_features, out_features)``.
        nodes: where the exported graphs use it.
        activation: the activation that follows every use and may be fused in, or ``""``.
        rows: rows of ``x`` in one call with the example inputs (product of the leading dims).
        dtype: of the weight.
        group: name of the input that it shares with other sites (q, k, v share one).
        tags: ``"tied"``, ``"transposed"``, ``"functional"``, ``"convolution"``.
        window: of a convolution, whose weight counts as a matrix (out, in * kernel).
    """

    name: str
    module: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    transposed: bool
    nodes: tuple[NodeRef, ...]
    activation: str
    rows: int
    dtype: torch.dtype
    group: str
    tags: frozenset[str] = frozenset()
    window: Window | None = None


@dataclass(frozen=True, eq=False)
class InputStats:
    """Second moments of one distinct input of a group of sites.

    Attributes:
        gram: ``E[x x^T]``, float64 ``(n, n)``.
        mean: ``E[x]``, float64 ``(n,)``.
        rows: how many rows went in.
        dropped: rows left out because they were not finite.
    """

    gram: Tensor
    mean: Tensor
    rows: int
    dropped: int = 0


@dataclass(frozen=True, eq=False)
class Profile:
    """What the calibration data say about the model.

    Attributes:
        stats: for each group of sites the moments of their shared input.
        batches: calibration calls that went in.
        rows: rows of the first group's input over all batches.
        notes: sentences for the report.
        out_grams: for each site that has one ``E[g g^T]``, damped, float64 ``(m, m)``: what the
            model's output feels of the site's.
    """

    stats: Mapping[str, InputStats]
    batches: int
    rows: int
    notes: tuple[str, ...] = ()
    out_grams: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Price:
    """What one form costs at one number of rows, against the best dense kernel.

    Attributes:
        form: text of the form.
        rows: rows a call.
        latency_ms, baseline_ms: lower quartiles, interleaved in one run.
        kernel: what ran, ``"tile[64]"``, ``"onednn"``, ``"aten"``.
        config: the kernel's configuration, for the artifact.
        baseline: the dense kernel that was fastest.
        spread: (upper quartile - lower quartile) / lower quartile.
        source: ``"measured"`` or ``"predicted"``.
        expected_ms: what the cost model expects of the form; 0 if it was not asked.
        without: why no emitted kernel serves the form, where PyTorch's operators do.
    """

    form: str
    rows: int
    latency_ms: float
    baseline_ms: float
    kernel: str
    config: Mapping[str, int | str]
    baseline: str
    spread: float
    source: str
    expected_ms: float = 0.0
    without: Refusal | None = None

    @property
    def speedup(self) -> float:
        """``baseline_ms / latency_ms``."""
        return self.baseline_ms / self.latency_ms if self.latency_ms > 0 else 1.0


@dataclass(frozen=True)
class Candidate:
    """One way to compute one site.

    Attributes:
        site: the site's name.
        family: name of the family, ``"dense"`` for the site as it is.
        hyper: of the family.
        params: elements of the factors, bias not counted.
        flops: of one row, bias not counted.
        error: relative output error under the calibration Gram, each direction weighted by what
            the model's output feels of it where that is known.
        price: its latency at the site's rows.
        exact: the weight is of this class and the error, on the data too, is rounding: no budget
            speaks of it.
    """

    site: str
    family: str
    hyper: Hyper
    params: int
    flops: int
    error: float
    price: Price
    exact: bool = False


@dataclass(frozen=True)
class Choice:
    """The decision at one site."""

    family: str
    hyper: Hyper = field(default_factory=dict)


@dataclass(frozen=True)
class PlanPoint:
    """One point of the trade between latency and quality that selection saw.

    Attributes:
        latency_ms, predicted_error: of the plan, from prices and errors of its sites.
        loss: of quality, measured on the selection part: relative, 0 is the original.
        chosen: whether the plan was taken.
    """

    latency_ms: float
    predicted_error: float
    loss: float | None
    chosen: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """What to do at each site, and what that is predicted to bring.

    Attributes:
        choices: a decision for every linear site, and for attention whose heads may take methods.
        predicted_ms, dense_ms: sums over the sites.
        predicted_error: square root of the sum of squared (sensitivity * site error).
        points: the plans that selection compared.
        sensitivities: model output error / site output error.
        notes: sentences for the report.
        words: for each site the paragraph of the report about it.
    """

    choices: Mapping[str, Choice]
    predicted_ms: float = 0.0
    dense_ms: float = 0.0
    predicted_error: float = 0.0
    points: tuple[PlanPoint, ...] = ()
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)

    def explain(self, site: str) -> str:
        """What was decided at a site, what it gains and costs, and why not more.

        Args:
            site: its name, or the start of several names.
        """
        every = list(dict.fromkeys([*self.choices, *self.words]))
        found = [s for s in every if s == site or s.startswith(f"{site}.")]
        if not found:
            from structc.names import no_match

            raise no_match("site", site, every)
        return "\n".join(self.words.get(s) or f"{s}: {self.choices[s].family}" for s in found)


@dataclass(frozen=True)
class Timed:
    """One timed callable: quartiles in milliseconds over interleaved rounds."""

    latency_ms: float
    median_ms: float
    spread: float
    rounds: int


@dataclass(frozen=True)
class Verification:
    """What the compiled model does, measured against the original on held-out data.

    Attributes:
        error: largest relative output error over the held-out calls.
        tolerance: what ``error`` was held against, if it was.
        metric_name: of the quality measure, ``""`` if none was used.
        metric_dense, metric_compiled: its values before and after.
        max_drop: the relative drop that was allowed.
        held: whether the budget holds.
        calls: held-out calls that were compared.
        rolled_back: sites that went back to a milder form or to dense, with what selection chose.
        replaced: sites that structc's own layers compute, dense ones among them.
        latency: ``"structc"`` and each baseline, interleaved in one run.
        runner: how regions run: ``"graph"``, ``"inductor"`` or ``"modules"``.
        notes: sentences for the report.
    """

    error: float
    tolerance: float | None
    metric_name: str
    metric_dense: float | None
    metric_compiled: float | None
    max_drop: float | None
    held: bool
    calls: int
    rolled_back: Mapping[str, Choice] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()
    latency: Mapping[str, Timed] = field(default_factory=dict)
    runner: str = "modules"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Captured:
    """A model and the graphs that were exported from it.

    Attributes:
        tree: the shallow clone that owns the product's parameters.
        example: a call of the model.
        regions: graphs that run in the product, outermost submodules only.
        analysis: a graph of the whole model that is only read (cache off), if regions are partial.
        leaf_rows: leaf modules that the example call reached, with the rows of their input.
        refusals: submodules that could not be exported, with the reason.
        filters: depthwise convolutions that run by FFT in products and in the graphs, with the
            milliseconds of both; in the tree they are as they were.
    """

    tree: nn.Module
    example: Call
    regions: tuple[Region, ...]
    analysis: Region | None
    leaf_rows: Mapping[str, int]
    refusals: tuple[Refusal, ...]
    filters: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Sites:
    """What detection found.

    Attributes:
        linear: dense linear maps.
        attention: attention ops, each with what computes it.
        refusals: dense maps that must stay as they are, with the reason.
        convolutions: those that may turn out to have an exact structure; ``linear`` has those that
            do, from then on.
    """

    linear: tuple[LinearSite, ...]
    attention: tuple[AttentionSite, ...]
    refusals: tuple[Refusal, ...]
    convolutions: tuple[LinearSite, ...] = ()
