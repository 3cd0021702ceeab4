"""``structc cache``: what was measured and built on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from structc import settings
from structc.cli import flags
from structc.cli.session import Answer, command, note
from structc.errors import ConfigError, VerificationFailed
from structc.progress import progress_bars

if TYPE_CHECKING:
    from structc.codegen.bench import Job
    from structc.codegen.tuning_db import Row, TuningDb

File = Annotated[Path, typer.Argument(metavar="FILE", help="A JSON file.", show_default=False)]

app = typer.Typer(
    name="cache",
    no_args_is_help=True,
    help="The tuning database and the built kernels of this machine.",
)


def _database() -> TuningDb:
    from structc.codegen.tuning_db import TuningDb

    return TuningDb(strict=True)


@command
def path(as_json: flags.AsJson = False, verbose: flags.Verbose = False) -> Answer:
    """Print the folder that holds the tuning database and the built kernels.

    \b
    Example:
      rm -r "$(structc cache path)"
    """
    folder = str(settings.current().cache_dir)
    return Answer({"path": folder}, folder)


@command
def list_(
    every: Annotated[
        bool, typer.Option("--all", help="Also configurations that were not chosen or refused.")
    ] = False,
    as_json: flags.AsJson = False,
    verbose: flags.Verbose = False,
) -> Answer:
    """List what was measured: the chosen kernel of each form, newest first.

    \b
    Examples:
      structc cache list
      structc cache list --all --json
    """
    rows = [_plain(k, r) for k, r in _database().list() if every or r.effort]
    return Answer(rows, _listed(rows))


@command
def prune(
    older_than: Annotated[
        float, typer.Option(min=0, metavar="DAYS", help="Delete rows older than that.")
    ] = 90.0,
    foreign: Annotated[
        bool,
        typer.Option("--foreign", help="Also rows of other processors, PyTorch or structc."),
    ] = False,
    as_json: flags.AsJson = False,
    verbose: flags.Verbose = False,
) -> Answer:
    """Delete old measurements; what is needed again is measured again.

    \b
    Examples:
      structc cache prune --older-than 30
      structc cache prune --foreign
    """
    database = _database()
    gone = database.prune(older_than)
    if foreign:
        for key, row in database.list():
            gone += 0 if _from_here(key) else database.delete(key, row)
    return Answer({"deleted": gone}, f"{gone} rows deleted")


@command
def export(
    file: File,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    as_json: flags.AsJson = False,
    verbose: flags.Verbose = False,
) -> Answer:
    """Write every measurement to a JSON file, to be imported on a machine of the same kind.

    \b
    Example:
      structc cache export tuned.json
    """
    if file.exists() and not overwrite:
        raise ConfigError(f"{file} exists already", hint="--overwrite replaces it.")
    count = _database().export_json(file)
    return Answer({"file": str(file), "rows": count}, f"{count} rows written to {file}")


@command
def import_(file: File, as_json: flags.AsJson = False, verbose: flags.Verbose = False) -> Answer:
    """Add the measurements of an export; only those of the same machine and versions are used.

    \b
    Example:
      structc cache import tuned.json
    """
    database = _database()
    count = database.import_json(file)
    here = sum(_from_here(key) for key, _ in database.list())
    text = f"{count} new rows from {file}; {here} rows here are of this machine and version"
    return Answer({"file": str(file), "rows": count, "usable": here}, text)


@command
def verify(
    remove: Annotated[
        bool, typer.Option("--remove", help="Delete the rows of kernels that fail.")
    ] = False,
    as_json: flags.AsJson = False,
    no_progress: flags.NoProgress = False,
    verbose: flags.Verbose = False,
) -> Answer:
    """Build each chosen kernel of this machine again and hold it against the reference.

    \b
    Examples:
      structc cache verify
      structc cache verify --remove
    """
    from structc.codegen.worker_client import Worker
    from structc.records import Refusal

    database = _database()
    chosen = [(k, r) for k, r in database.list() if r.effort and r.status == "ok"]
    mine = [(k, r) for k, r in chosen if _from_here(k)]
    failed: list[dict[str, Any]] = []
    with progress_bars(wanted=not no_progress) as progress, Worker() as worker:
        for done, (key, row) in enumerate(mine):
            progress("verify", done, len(mine))
            found = worker.check(_job(key, row))
            worker.forget()
            if isinstance(found, Refusal):
                failed.append({**_plain(key, row), "why": f"{found.code}: {found.reason}"})
                if remove:
                    database.delete(key, row)
    if len(chosen) > len(mine):
        note(f"{len(chosen) - len(mine)} rows of other machines or versions were not checked")
    data = {"checked": len(mine), "failed": failed, "removed": len(failed) if remove else 0}
    lines = [f"{len(mine) - len(failed)} of {len(mine)} kernels are right"]
    lines += [f"  {f['form']} at {f['rows']} rows: {f['why']}" for f in failed]
    error = None
    if failed and not remove:
        error = VerificationFailed(
            f"{len(failed)} recorded kernels fail", hint="--remove deletes their rows."
        )
    return Answer(data, "\n".join(lines), error=error)


def _job(key: Mapping[str, Any], row: Row) -> Job:
    from structc.codegen.bench import Job

    form = str(key["form"])
    return Job(
        form.removesuffix("+bias").removesuffix("+parts"),
        int(key["rows"]),
        str(key["dtype"]),
        form.endswith("+bias"),
        bool(key["transposed"]),
        row.kernel,
        row.config,
    )


def _from_here(key: Mapping[str, Any]) -> bool:
    """Whether this process would use a row: the same processor, versions and kernel sources."""
    from structc.codegen import tuning_db
    from structc.hardware import target

    now = target()
    return (
        key.get("cpu") == now.cpu
        and list(key.get("isa", ())) == list(now.isa)
        and key.get("torch") == now.torch
        and key.get("source") == tuning_db.source_hash()
    )


def _plain(key: Mapping[str, Any], row: Row) -> dict[str, Any]:
    return {**key, **asdict(row), "config": dict(row.config), "usable": _from_here(key)}


def _listed(rows: list[dict[str, Any]]) -> str:
    return "\n".join(_lines(rows)) if rows else "nothing is measured yet"


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    wide = max(12, *(len(str(r["form"])) for r in rows))
    yield f"{'form':<{wide}}  {'rows':>6}  {'dtype':<9} {'kernel':<8} {'ms':>9} {'x dense':>8}  age"
    for r in rows:
        age = (time.time() - r["time"]) / 86400
        ok = r["status"] == "ok"
        speedup = f"{r['baseline_ms'] / r['latency_ms']:.2f}" if ok else "refused"
        where = "" if r["usable"] else "  (other machine or version)"
        yield (
            f"{r['form']:<{wide}}  {r['rows']:>6}  {r['dtype']:<9} {r['kernel']:<8} "
            f"{r['latency_ms']:>9.4g} {speedup:>8}  {age:.0f} d{where}"
        )


for name, function in (
    ("path", path),
    ("list", list_),
    ("prune", prune),
    ("export", export),
    ("import", import_),
    ("verify", verify),
):
    app.command(name)(function)
