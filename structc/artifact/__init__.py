"""Stage 10b: what a user keeps. A folder of safetensors and JSON; no pickle, no code.

    model.safetensors   the whole state: factors, untouched parameters, every buffer
    structc.json        schema version, plan, sites, regions, tuned kernels, sha256 of every file
    report.json, report.html

Loading never runs code from the artifact: the model's code comes from the user, families from a
fixed table, kernels are rebuilt from typed parameters. Sizes are checked before anything is
allocated.
"""

from __future__ import annotations

from structc.artifact.files import MANIFEST, REPORT_HTML, REPORT_JSON, SCHEMA, WEIGHTS
from structc.artifact.read import check_same_model, guards_from, read, sites_from
from structc.artifact.write import save

__all__ = [
    "MANIFEST",
    "REPORT_HTML",
    "REPORT_JSON",
    "SCHEMA",
    "WEIGHTS",
    "check_same_model",
    "guards_from",
    "read",
    "save",
    "sites_from",
]
