"""``structc doctor MODEL``: what of a model is captured as a graph, and what is not, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from structc.cli.doctor import BROKEN, OK, WARNING, Line
from structc.errors import StructcError
from structc.inputs import describe, to_call
from structc.passes.capture import capture
from structc.passes.detect import detect
from structc.sources import TextOptions, load_source

MOST = 12
"""Reasons shown."""


def examine(spec: str, text: TextOptions, *, trust: bool) -> Iterator[Line]:
    """Load, run, export and search a model; errors of its own are findings, not errors.

    Errors: those of :func:`structc.sources.load_source`: a wrong argument is not a finding.
    """
    source = load_source(spec, text, trust=trust)
    model: Any = source.model.eval()
    yield Line("model", OK, f"{type(model).__name__}, {_size(model)} parameters")
    given = source.example_inputs
    for name in ("dummy_inputs", "example_input_array"):
        given = getattr(model, name, None) if given is None else given
    example = to_call(given)
    try:
        captured = capture(model, example)
    except StructcError as e:
        yield Line("run", BROKEN, str(e).split("\n", 1)[0], e.hint)
        return
    yield Line("run", OK, describe(example))
    whole = any(region.path == "" for region in captured.regions)
    if whole:
        yield Line("export", OK, "the whole model exports")
    elif captured.regions:
        paths = [r.path for r in captured.regions]
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        text_ = f"{len(paths)} parts export: {', '.join(paths[:3])}{more}"
        yield Line(
            "export", WARNING, text_, "The rest runs as plain modules; layers are rewritten."
        )
    else:
        todo = "Layers are still rewritten one by one, without fusing what follows them."
        yield Line("export", WARNING, "no part of the model exports", todo)
    for refusal in captured.refusals[:MOST]:
        yield Line("export", WARNING, f"{refusal.site or 'model'}: {refusal.reason}")
    sites = detect(captured)
    status = OK if sites.linear else WARNING
    found = f"{len(sites.linear)} linear layers, {len(sites.attention)} attention ops"
    yield Line("layers", status, found)
    for refusal in sites.refusals[:MOST]:
        yield Line("layers", OK, f"{refusal.site} stays dense: {refusal.reason}")


def _size(model: Any) -> str:
    count = sum(p.numel() for p in model.parameters())
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
