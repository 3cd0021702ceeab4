"""``structc verify``, ``structc report`` and ``structc bench``: what an artifact is worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from structc.cli import flags
from structc.cli.place import MANIFEST
from structc.cli.session import Answer, command, note
from structc.errors import ArtifactCorrupt, ConfigError, VerificationFailed

if TYPE_CHECKING:
    from torch import nn

    from structc.records import Call, Timed
    from structc.report import Report
    from structc.sources import Source

MOST_BYTES = 64 * 1024 * 1024
REPORT = "report.json"

Against = Annotated[
    str,
    typer.Option(
        "--against",
        metavar="MODEL",
        help="The model that OUT was converted from; its code is run, its weights are compared.",
        show_default=False,
    ),
]
MaybeAgainst = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="MODEL",
        help="The model that OUT was converted from.",
        show_default=False,
    ),
]
Rounds = Annotated[
    int, typer.Option(min=1, max=1000, help="Interleaved rounds; the lower quartile is shown.")
]


# ---------------------------------------------------------------------------- report


@command
def report(
    out: flags.Artifact,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the report as an HTML page.", show_default=False),
    ] = None,
    as_json: flags.AsJson = False,
    verbose: flags.Verbose = False,
) -> Answer:
    """Show the report that was saved with an artifact.

    \b
    Examples:
      structc report out
      structc report out --html report.html
      structc report out --json
    """
    found = saved_report(out)
    if html is not None:
        if html.suffix.lower() != ".html":
            raise ConfigError(f"--html {str(html)!r}: expected a name that ends in .html")
        found.save(html)
        note(f"wrote {html}")
    return Answer(found.to_dict(), found)


def saved_report(out: Path) -> Report:
    """The report of an artifact; without its weights, so without torch.

    Errors: :class:`ArtifactCorrupt` if it is missing, altered or no report.
    """
    from structc.report import Report

    if not (out / MANIFEST).is_file():
        raise ArtifactCorrupt(
            f"{out} is no structc artifact: {MANIFEST} is missing",
            hint="Give the folder that `structc convert -o` wrote.",
        )
    manifest, _ = _json(out / MANIFEST)
    data, digest = _json(out / REPORT)
    recorded = manifest.get("sha256")
    if not isinstance(recorded, dict) or recorded.get(REPORT) != digest:
        raise ArtifactCorrupt(
            f"{out / REPORT}: its sha256 is not the recorded one: truncated or altered",
            hint="Convert the model again, or fetch the artifact again.",
        )
    return Report.from_dict(data)


def _json(file: Path) -> tuple[dict[str, Any], str]:
    """A JSON object and the sha256 of its file."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError("it is far too large")
        content = file.read_bytes()
        data = json.loads(content)
        if not isinstance(data, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as e:
        raise ArtifactCorrupt(f"{file} cannot be read: {e}") from None
    return data, hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------------- verify


@command
def verify(
    out: flags.Artifact,
    against: Against,
    calib: flags.Calib = None,
    seqlen: flags.Seqlen = None,
    nsamples: flags.Samples = None,
    batch_size: flags.BatchSize = None,
    rounds: Rounds = 9,
    trust: flags.Trust = False,
    as_json: flags.AsJson = False,
    verbose: flags.Verbose = False,
) -> Answer:
    """Load an artifact and compare it with the original: error, metric and latency.

    Quality is judged by the budget in the artifact's report (exit code 4 outside of it), on the
    part of the calibration data that a conversion holds out, or on the example inputs. Latency is
    shown and not judged: it belongs to this machine and this minute.

    \b
    Examples:
      structc verify out --against model.py:make
      structc verify out --against ./all-MiniLM-L6-v2 --calib texts.txt
    """
    promised = saved_report(out)
    import structc
    from structc.sources import load_source

    source = load_source(
        against, flags.text_options(calib, seqlen, nsamples, batch_size), trust=trust
    )
    for sentence in source.notes:
        note(sentence)
    source.model.eval()
    fast = structc.load(out, source.model)
    data = {
        "artifact": str(out),
        "against": against,
        **_quality(promised, source, fast),
        "latency": _timed(_pair(source, fast), rounds),
    }
    error = None
    if not data["held"]:
        error = VerificationFailed(
            f"{out} is outside of what its report promises: {data['why']}",
            hint="Compare on data like those of the conversion; if they are, convert again.",
        )
    return Answer(data, _verify_text(data), error=error)


def _quality(promised: Report, source: Source, fast: nn.Module) -> dict[str, Any]:
    """Error and metric of an artifact, held against its report's budget."""
    from dataclasses import replace

    from structc.inputs import calibration_calls
    from structc.passes import verify as V
    from structc.passes.calibrate import split

    budget, tolerance = _budget(promised, source)
    example = _example(source)
    if source.calibration is None:
        select = held_out = [example]
        data = "example inputs"
    else:
        parts = split(calibration_calls(source.calibration))
        select, held_out = list(parts.select), list(parts.verify)
        data = "held-out calibration data"
    wanted = V.references(source.model, held_out)
    error = V.worst_error(fast, held_out, wanted)
    asked = budget if budget.max_drop is not None else replace(budget, error=None, max_drop=0.0)
    quality = V.quality_for(asked, source.model, select, held_out)
    assert quality is not None
    value, dense = quality.value(fast, "verify"), quality.dense["verify"]
    limit = _limit(budget, tolerance, wanted)
    held = V.holds(budget, error, float("inf") if limit is None else limit, value, dense)
    why = f"relative output error {error:.3g}, {'' if limit is None else f'at most {limit:.3g}'}"
    if budget.max_drop is not None:
        why = f"{quality.name} {dense:.4g} -> {value:.4g}, allowed drop {budget.max_drop:.2%}"
    return {
        "held": bool(held),
        "why": why,
        "data": data,
        "calls": len(held_out),
        "error": error,
        "error_limit": limit,
        "metric": quality.name,
        "metric_dense": dense,
        "metric_compiled": value,
        "max_drop": budget.max_drop,
    }


def _budget(promised: Report, source: Source) -> tuple[Any, float | None]:
    """The budget of a report, with the metric that it names, and the tolerance that it recorded.

    Errors: :class:`ConfigError` if the metric is a function that the model does not bring.
    """
    from structc import metrics
    from structc.budget import Budget

    data = promised.to_dict()
    saved = data["options"].get("budget")
    saved = saved if isinstance(saved, Mapping) else {}
    name, metric = saved.get("metric"), None
    if saved.get("max_drop") is not None and name is not None:
        known = (metrics.similarity_spearman, metrics.cosine, metrics.kl, metrics.top1_agreement)
        metric = source.metric or next((m for m in known if m.name == name), None)
        if metric is None:
            raise ConfigError(
                f"the artifact's budget is a drop of the metric {str(name)!r}, which is not here",
                hint="Give as --against the factory that returns this metric with the model.",
            )
    limits = {k: saved.get(k) for k in ("max_drop", "error", "latency", "params")}
    checked = data["verification"] or {}
    return Budget(metric=metric, **limits), checked.get("tolerance")


def _limit(budget: Any, tolerance: float | None, wanted: Sequence[Any]) -> float | None:
    """The relative output error that is allowed; None where the budget limits none."""
    from structc.passes.verify import exact_tolerance

    if budget.max_drop is not None:
        return None
    if budget.error is not None:
        return float(budget.error)
    if not budget.exact:
        return None
    return max([tolerance or 0.0, *map(exact_tolerance, wanted)])


def _example(source: Source) -> Call:
    from structc.inputs import to_call

    model: Any = source.model
    for value in (
        source.example_inputs,
        getattr(model, "dummy_inputs", None),
        getattr(model, "example_input_array", None),
    ):
        if value is not None:
            return to_call(value)
    raise ConfigError("the model brings no example inputs")


def _verify_text(data: Mapping[str, Any]) -> str:
    limit, drop = data["error_limit"], data["max_drop"]
    held = "within" if data["held"] else "OUTSIDE OF"
    return "\n".join(
        [
            f"{data['artifact']} is {held} what its report promises.",
            "",
            f"  compared on          {data['calls']} calls of {data['data']}",
            f"  relative error       {data['error']:.3g}"
            + ("" if limit is None else f"  (at most {limit:.3g})"),
            f"  {data['metric']:<19}  {data['metric_dense']:.4g} -> {data['metric_compiled']:.4g}"
            + ("" if drop is None else f"  (at most {drop:.2%} less)"),
            "",
            *_table(data["latency"]),
        ]
    )


# ---------------------------------------------------------------------------- bench


@command
def bench(
    what: Annotated[
        str,
        typer.Argument(metavar="OUT|MODEL", help="An artifact, or a model.", show_default=False),
    ],
    against: MaybeAgainst = None,
    rounds: Rounds = 9,
    torch_compile: Annotated[
        bool,
        typer.Option(
            "--torch-compile/--no-torch-compile",
            help="Time torch.compile with freezing too; it takes minutes for large models.",
        ),
    ] = True,
    seqlen: flags.Seqlen = None,
    batch_size: flags.BatchSize = None,
    trust: flags.Trust = False,
    as_json: flags.AsJson = False,
    verbose: flags.Verbose = False,
) -> Answer:
    """Time an artifact against eager PyTorch and torch.compile, in turns, on the example inputs.

    With a model alone, time its dense versions.

    \b
    Examples:
      structc bench out --against model.py:make
      structc bench model.py:make --rounds 21 --json
    """
    if against is None and (Path(what) / MANIFEST).is_file():
        raise ConfigError(
            f"{what} is an artifact: it holds no code to run",
            hint=f"Name its model: structc bench {what} --against MODEL.",
        )
    if against is not None:
        saved_report(Path(what))
    import structc
    from structc.hardware import target
    from structc.inputs import describe
    from structc.passes.verify import baselines
    from structc.sources import load_source

    text = flags.text_options(None, seqlen, None, batch_size)
    source = load_source(what if against is None else against, text, trust=trust)
    source.model.eval()
    fast = None if against is None else structc.load(what, source.model)
    example = _example(source)
    calls, notes = baselines(source.model, example, compiled=torch_compile)
    if fast is not None:
        calls["structc"] = _caller(fast, example)
    for sentence in notes:
        note(sentence)
    rows = _timed(calls, rounds)
    data = {
        "model": what if against is None else against,
        "artifact": None if against is None else what,
        "inputs": describe(example),
        "target": target().to_dict(),
        "latency": rows,
        "notes": notes,
    }
    return Answer(data, "\n".join([f"inputs {describe(example)}", "", *_table(rows)]))


def _pair(source: Source, fast: nn.Module) -> dict[str, Callable[[], object]]:
    example = _example(source)
    return {"eager": _caller(source.model, example), "structc": _caller(fast, example)}


def _caller(model: nn.Module, example: Call) -> Callable[[], object]:
    import torch

    def call() -> object:
        with torch.no_grad():
            return model(*example.args, **example.kwargs)

    return call


def _timed(calls: Mapping[str, Callable[[], object]], rounds: int) -> list[dict[str, Any]]:
    """Every version, fastest first, with its speed against eager."""
    from structc.timing import interleaved

    timed: dict[str, Timed] = interleaved(calls, rounds=rounds, min_sample_ms=5.0)
    eager = timed["eager"].latency_ms
    return [
        {
            "name": name,
            "latency_ms": t.latency_ms,
            "median_ms": t.median_ms,
            "spread": t.spread,
            "rounds": t.rounds,
            "speedup_over_eager": eager / t.latency_ms if t.latency_ms > 0 else 1.0,
        }
        for name, t in sorted(timed.items(), key=lambda item: item[1].latency_ms)
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    wide = max(len(r["name"]) for r in rows)
    head = f"  {'':<{wide}}  {'ms':>10}  {'median':>10}  {'spread':>7}  {'x eager':>8}"
    return [head] + [
        f"  {r['name']:<{wide}}  {r['latency_ms']:>10.4g}  {r['median_ms']:>10.4g}"
        f"  {r['spread']:>6.0%}  {r['speedup_over_eager']:>8.2f}"
        for r in rows
    ]
