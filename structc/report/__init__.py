"""Stage 10: the rewrite report, as plain data, as text and as one self-contained HTML file.

A report is its data: text and HTML are rendered from :meth:`Report.to_dict`, so a report that was
read back from ``report.json`` looks the same. rich and jinja2 are imported when something is
rendered, never before.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structc.errors import ConfigError
from structc.files import write_atomic
from structc.report import data as collect
from structc.report import schema as schema
from structc.report import whole
from structc.report.attention import attention_data
from structc.report.words import headline

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from structc.hardware import Target
    from structc.records import Candidate, Plan, Profile, Refusal, Sites, Verification


@dataclass(frozen=True)
class Report:
    """What was done to a model, site by site: what it gained, what it cost, and why not otherwise.

    Attributes:
        data: the report as plain JSON data; use :meth:`to_dict` for a copy to change.
    """

    data: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data with ``"schema_version"``; no NaN or infinity in it."""
        return deepcopy(dict(self.data))

    @classmethod
    def from_dict(cls, data: object) -> Report:
        """The report that gave this data.

        Raises:
            ArtifactVersion: a newer structc wrote it.
            ArtifactCorrupt: something is missing or of another type.
        """
        return cls(schema.checked(data))

    @property
    def headline(self) -> str:
        """The outcome in a sentence."""
        return str(self.data["headline"])

    def explanations(self) -> dict[str, str]:
        """For each linear site what was decided there, and why, in a paragraph."""
        from structc.report.explain import explanations

        return explanations(self.to_dict())

    def layer_status(self) -> list[dict[str, Any]]:
        """One flat dict a linear site: ``pandas.DataFrame(report.layer_status())``."""
        return [_flat(site) for site in self.data["sites"]]

    def to_html(self) -> str:
        """One HTML page that loads nothing from elsewhere."""
        from structc.report.html import render

        return render(self.to_dict())

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report; the suffix says how: ``.html``, ``.json`` or ``.txt``.

        The file is complete or absent: it is written beside its place and then renamed.
        """
        path = Path(path)
        writers = {".html": self.to_html, ".json": self.to_json, ".txt": self._text_file}
        if path.suffix.lower() not in writers:
            raise ConfigError(
                f"report.save({str(path)!r}): expected a name that ends in .html, .json or .txt, "
                f"got {path.suffix or 'no suffix'!r}",
                hint="The suffix says which form to write; pass for example 'report.html'.",
            )
        write_atomic(path, writers[path.suffix.lower()]().encode())

    def print_to(self, console: Console) -> None:
        """Print on a rich console, in colour where it has some."""
        console.print(self.__rich__())

    def __rich__(self) -> RenderableType:
        from structc.report.text import ReportText

        return ReportText(self.to_dict())

    def __str__(self) -> str:
        from structc.report.text import to_text

        return to_text(self.to_dict())

    def __repr__(self) -> str:
        return f"<Report of {self.data['model']!r}: {self.headline}>"

    def _text_file(self) -> str:
        from structc.report.text import to_text

        return to_text(self.to_dict(), width=100, encoding="utf-8") + "\n"

    def _repr_html_(self) -> str:
        from structc.report.html import frame

        return frame(self.to_html())


def build_report(
    *,
    model_name: str,
    target: Target,
    options: Mapping[str, object],
    sites: Sites,
    time_share: Mapping[str, float],
    profile: Profile | None,
    candidates: Mapping[str, Sequence[Candidate]],
    refusals: Sequence[Refusal],
    plan: Plan | None,
    verification: Verification | None,
    stages: Mapping[str, float],
    peak_memory_mb: float,
    packed_bytes: int = 0,
    notes: Sequence[str] = (),
) -> Report:
    """Collect what the stages found.

    Args:
        model_name: for the title.
        target: the machine that the times were taken on.
        options: of the call: ``budget``, ``effort``, ``seed`` ...
        sites: from detection.
        time_share: share of the dense model's time by site name, and of ``"attention"``,
            ``"other"`` and the like.
        profile: from calibration; None means that fits knew no data.
        candidates: by site, all that were priced and fitted.
        refusals: of every stage; those in ``sites`` need not be repeated.
        plan: from selection; None for ``inspect``.
        verification: of the compiled model; None if there was none.
        stages: seconds by stage, in order.
        peak_memory_mb: of the whole conversion.
        packed_bytes: derived copies of weights that fast kernels hold.
        notes: sentences for the reader.
    """
    every = list(dict.fromkeys([*sites.refusals, *refusals]))
    rows = collect.sites_data(sites, candidates, every, plan, verification, time_share)
    names = {site["name"] for site in rows}
    elsewhere = {k: collect.finite(v) or 0.0 for k, v in time_share.items() if k not in names}
    data: dict[str, Any] = {
        "kind": "inspect" if plan is None else "compile",
        "model": model_name,
        "tier": "none" if plan is None else collect.tier(rows, sites),
        **_outcome(rows, verification, collect.plain(dict(options))),
        "time_elsewhere": elsewhere,
        "sites": rows,
        "attention": [
            attention_data(s, candidates.get(s.name, ()), plan, verification)
            for s in sites.attention
        ],
        "refusals": [collect.refusal_data(r) for r in every],
        "plan": whole.plan_data(plan),
        "calibration": whole.profile_data(profile),
        "stages": [{"name": k, "seconds": collect.finite(v)} for k, v in stages.items()],
        "peak_memory_mb": collect.finite(peak_memory_mb),
        "packed_bytes": int(packed_bytes),
        "target": collect.plain(target),
        "notes": list(notes),
    }
    return Report({**_header(), **data, "headline": headline(data)})


def _header() -> dict[str, Any]:
    """What wrote a report, and when."""
    return {
        "schema_version": schema.VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"structc": _version(), "python": platform.python_version()},
    }


def _outcome(
    rows: Sequence[dict[str, Any]], verification: Verification | None, options: dict[str, Any]
) -> dict[str, Any]:
    """What came of the whole model, against what was asked."""
    latency = whole.latency_data(verification)
    verified = whole.verification_data(verification)
    summary = whole.summary_data(rows, latency, verified)
    return {
        "options": options,
        "summary": summary,
        "budgets": whole.budgets_data(options, summary, verified, latency),
        "latency": latency,
        "verification": verified,
    }


def _version() -> str:
    try:
        return metadata.version("structc")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "checkout"


def _flat(site: Mapping[str, Any]) -> dict[str, Any]:
    keep = ("name", "in_features", "out_features", "rows", "dtype", "rewritten", "rolled_back")
    cost = ("kernel", "dense_ms", "chosen_ms", "speedup", "params", "params_kept", "error")
    more = ("sensitivity", "time_share")
    choice = site["choice"] or {"family": None, "hyper": {}}
    return {
        **{k: site[k] for k in keep},
        "family": choice["family"],
        "hyper": ", ".join(f"{k}={v}" for k, v in choice["hyper"].items()),
        **{k: site[k] for k in (*cost, *more)},
        "candidates": len(site["candidates"]),
        "refusals": len(site["refusals"]),
    }
