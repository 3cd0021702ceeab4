"""``structc verify``, ``structc report`` and ``structc bench``: what an artifact is worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from structc.cli import flags
from structc.cli.place import MANIFEST
from structc.cli.session import Answer, command, note
from structc.cli.timed import example_of, pair, table, timed_rows
from structc.errors import ArtifactCorrupt, ConfigError, VerificationFailed

if TYPE_CHECKING:
    from torch import nn

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

    Errors: :class:`ConfigError` if there is no such folder; :class:`ArtifactCorrupt` if the report
        is missing, altered or none.
    """
    from structc.report import Report

    if not out.is_dir():
        raise ConfigError(
            f"{out}: there is no such folder",
            hint="Give the folder that `structc convert -o` wrote.",
        )
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
        "latency": timed_rows(pair(source, fast), rounds),
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
    example = example_of(source)
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
            *table(data["latency"]),
        ]
    )
