"""What ``report.json`` must look like to be read back: types of every field, nothing more.

A report may come from anywhere, so a renderer never sees data that this module has not checked.
"""

from __future__ import annotations

import json
from typing import Any

from structc.errors import ArtifactCorrupt, ArtifactVersion

VERSION = 1

TEXT, FLAG, WHOLE = "text", "true or false", "a whole number"
NUMBER, MAYBE = "a number", "a number or null"
MAYBE_WHOLE = "a whole number or null"
ANY = "anything"

_PYTHON: dict[str, tuple[type, ...]] = {
    TEXT: (str,),
    FLAG: (bool,),
    WHOLE: (int,),
    NUMBER: (int, float),
    MAYBE: (int, float, type(None)),
    MAYBE_WHOLE: (int, type(None)),
}

Spec = Any
"""A word above; a dict of fields; ``[spec]`` for a list; ``{"*": spec}`` for a mapping; ``(spec,)``
for a value that may be null."""

_HYPER = {"*": ANY}
_REFUSAL = {"site": TEXT, "family": TEXT, "code": TEXT, "reason": TEXT}
_CHOICE = {"family": TEXT, "hyper": _HYPER}
_MEASURES = (
    *("params_kept", "error", "latency_ms", "dense_ms", "speedup", "spread"),
    "expected_ms",
)
_CANDIDATE = {
    **_CHOICE,
    **dict.fromkeys(_MEASURES, MAYBE),
    **dict.fromkeys(("params", "flops"), WHOLE),
    **dict.fromkeys(("kernel", "baseline", "source", "form", "status", "why"), TEXT),
    **dict.fromkeys(("diverged", "exact"), FLAG),
    "config": _HYPER,
}
_SITE = {
    **dict.fromkeys(("name", "dtype", "activation", "shared_input", "kernel"), TEXT),
    **dict.fromkeys(("in_features", "out_features", "rows"), WHOLE),
    **dict.fromkeys(("bias", "rewritten", "rolled_back", "diverged", "exact"), FLAG),
    **dict.fromkeys(("time_share", "sensitivity", "dense_ms", "chosen_ms", "speedup"), MAYBE),
    **dict.fromkeys(("params_kept", "error"), MAYBE),
    "params": MAYBE_WHOLE,
    "fastest": MAYBE_WHOLE,
    "tags": [TEXT],
    "choice": (_CHOICE,),
    "candidates": [_CANDIDATE],
    "refusals": [_REFUSAL],
}
_TRIAL = {"method": TEXT, **dict.fromkeys(("error", "kl", "tv", "bound", "speedup"), MAYBE)}
_HEAD = {
    **dict.fromkeys(("head", "least", "most"), WHOLE),
    "method": TEXT,
    "numbers": {"*": MAYBE},
    "tried": [_TRIAL],
    "refused": [_REFUSAL],
}
_ATTENTION = {
    **dict.fromkeys(("name", "spelling", "mask_kind", "proven", "kernel", "baseline"), TEXT),
    **dict.fromkeys(("dense_ms", "chosen_ms"), MAYBE),
    "why": TEXT,
    **dict.fromkeys(("error", "sensitivity"), MAYBE),
    **dict.fromkeys(("rolled_back", "rotary"), FLAG),
    "candidates": [_CANDIDATE],
    "head_rows": [_HEAD],
    **dict.fromkeys(("by_method", "heads", "kv_heads", "head_dim", "length"), WHOLE),
    "scale": MAYBE,
}
_LATENCY = {
    "name": TEXT,
    **dict.fromkeys(("latency_ms", "median_ms", "spread", "speedup"), MAYBE),
    "rounds": WHOLE,
    **dict.fromkeys(("ours", "best_dense"), FLAG),
}
_SUMMARY = {
    **dict.fromkeys(("sites", "rewritten", "replaced", "rolled_back", "could_be_faster"), WHOLE),
    **dict.fromkeys(("latency_ms", "best_dense_ms", "speedup"), MAYBE),
    **dict.fromkeys(("metric_kept", "params_kept"), MAYBE),
    "best_dense": TEXT,
}
_POINT = {"latency_ms": MAYBE, "predicted_error": MAYBE, "loss": MAYBE, "chosen": FLAG}
_PLAN = {
    **dict.fromkeys(("predicted_ms", "dense_ms", "predicted_error"), MAYBE),
    "points": [_POINT],
    "notes": [TEXT],
}
_VERIFICATION = {
    **dict.fromkeys(("error", "tolerance", "metric_dense", "metric_compiled", "max_drop"), MAYBE),
    **dict.fromkeys(("diverged", "held"), FLAG),
    **dict.fromkeys(("metric_name", "runner"), TEXT),
    **dict.fromkeys(("calls", "replaced"), WHOLE),
    "rolled_back": [TEXT],
    "notes": [TEXT],
}
_CALIBRATION = {**dict.fromkeys(("batches", "rows", "inputs", "dropped"), WHOLE), "notes": [TEXT]}
_BUDGET = {"name": TEXT, "limit": MAYBE, "value": MAYBE, "held": (FLAG,)}

REPORT: Spec = {
    "schema_version": WHOLE,
    **dict.fromkeys(("kind", "model", "created", "headline", "tier"), TEXT),
    "summary": _SUMMARY,
    "budgets": [_BUDGET],
    "latency": [_LATENCY],
    "time_elsewhere": {"*": NUMBER},
    "sites": [_SITE],
    "attention": [_ATTENTION],
    "refusals": [_REFUSAL],
    "plan": (_PLAN,),
    "verification": (_VERIFICATION,),
    "calibration": (_CALIBRATION,),
    "stages": [{"name": TEXT, "seconds": MAYBE}],
    "peak_memory_mb": MAYBE,
    "packed_bytes": WHOLE,
    "target": {"cpu": TEXT, "isa": [TEXT], "cores": WHOLE, "threads": WHOLE, "torch": TEXT},
    "versions": {"*": TEXT},
    "options": {"*": ANY},
    "notes": [TEXT],
}


def checked(data: object) -> dict[str, Any]:
    """A deep copy of report data, once it is known to be one."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactCorrupt(
            f"report: expected JSON data with a schema_version, got {type(data).__name__} "
            f"with schema_version {version!r}",
            hint="Pass what Report.to_dict() or report.json holds.",
        )
    if version > VERSION:
        raise ArtifactVersion(
            f"report: its schema is version {version}, this structc reads up to {VERSION}",
            hint="Update structc to read it.",
        )
    try:
        copy = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as e:
        raise ArtifactCorrupt(f"report: not plain JSON data: {e}") from None
    _check(copy, REPORT, "report")
    for i, site in enumerate(copy["sites"]):
        fastest = site["fastest"]
        if fastest is not None and not 0 <= fastest < len(site["candidates"]):
            raise _broken(f"report.sites[{i}].fastest", "the number of a candidate", fastest)
        if site["rewritten"] and site["choice"] is None:
            raise _broken(f"report.sites[{i}].choice", "the choice of a rewritten site", None)
    return copy


def _check(value: Any, spec: Spec, where: str) -> None:
    if spec == ANY:
        return
    if isinstance(spec, str):
        flag = isinstance(value, bool) and spec != FLAG  # a bool is an int to Python
        if flag or not isinstance(value, _PYTHON[spec]):
            raise _broken(where, spec, value)
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _broken(where, f"{spec} below 2**63", value)
    elif isinstance(spec, tuple):
        if value is not None:
            _check(value, spec[0], where)
    elif isinstance(spec, list):
        if not isinstance(value, list):
            raise _broken(where, "a list", value)
        for i, item in enumerate(value):
            _check(item, spec[0], f"{where}[{i}]")
    else:
        _check_fields(value, spec, where)


def _check_fields(value: Any, spec: dict[str, Spec], where: str) -> None:
    if not isinstance(value, dict):
        raise _broken(where, "an object", value)
    if "*" in spec:
        for name, item in value.items():
            _check(item, spec["*"], f"{where}.{name}")
        return
    for name, inner in spec.items():
        if name not in value:
            raise ArtifactCorrupt(f"{where}.{name}: missing", hint=_REMEDY)
        _check(value[name], inner, f"{where}.{name}")


_REMEDY = "The file is incomplete or was altered; write the report again."


def _broken(where: str, expected: str, got: Any) -> ArtifactCorrupt:
    text = json.dumps(got)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return ArtifactCorrupt(f"{where}: expected {expected}, got {shown}", hint=_REMEDY)
