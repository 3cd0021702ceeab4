"""``structc inspect`` and ``structc convert``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from structc.cli import flags
from structc.cli.place import FILES, Place
from structc.cli.session import Answer, command, note
from structc.errors import BudgetNotMet, ConfigError
from structc.progress import progress_bars

if TYPE_CHECKING:
    from structc.budget import Budget
    from structc.report import Report
    from structc.sources import Source
    from structc.sources.source import TextOptions

Out = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="OUT", help="Folder to write.", show_default=False),
]
BudgetText = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="TEXT",
        help="What may be spent: exact, or max_drop=1%, error=0.05, latency=0.8x, params=50%, "
        "joined by commas.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='JSON that forces choices: {"re:.*mlp.*": {"family": "low_rank", "rank": 64}, '
        '"head": null, "_default": "monarch"}.',
        show_default=False,
    ),
]
MOST_BYTES = 1024 * 1024


@command
def inspect(
    model: flags.Model,
    effort: flags.Effort = "none",
    ignore: flags.Ignore = None,
    calib: flags.Calib = None,
    seqlen: flags.Seqlen = None,
    nsamples: flags.Samples = None,
    batch_size: flags.BatchSize = None,
    trust: flags.Trust = False,
    as_json: flags.AsJson = False,
    no_progress: flags.NoProgress = False,
    verbose: flags.Verbose = False,
) -> Answer:
    """Show what could change in a model, and why not.

    Nothing is fitted and nothing is written. Prices are predicted, or with --effort measured.

    \b
    Examples:
      structc inspect model.py:make
      structc inspect ./all-MiniLM-L6-v2 --seqlen 128 --effort quick
    """
    text = flags.text_options(calib, seqlen, nsamples, batch_size)
    report = inspected(model, text, effort, ignore, trust=trust, no_progress=no_progress)
    return Answer(report.to_dict(), report)


def inspected(
    model: str,
    text: TextOptions,
    effort: str,
    ignore: list[str] | None,
    *,
    trust: bool,
    no_progress: bool,
) -> Report:
    """The report about a MODEL of which nothing is changed."""
    import structc
    from structc.sources import load_source

    with progress_bars(wanted=not no_progress) as progress:
        source = load_source(model, text, trust=trust)
        report = structc.inspect(
            source.model,
            source.example_inputs,
            effort=effort,
            ignore=ignore or (),
            progress=progress,
        )
    _tell(source)
    return report


@command
def convert(
    model: flags.Model,
    out: Out,
    budget: BudgetText = "exact",
    effort: flags.Effort = "quick",
    ignore: flags.Ignore = None,
    config: Config = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is random.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Inspect, say what would be written, write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact that is in OUT already.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Take up work that was interrupted.")
    ] = True,
    trust: flags.Trust = False,
    calib: flags.Calib = None,
    seqlen: flags.Seqlen = None,
    nsamples: flags.Samples = None,
    batch_size: flags.BatchSize = None,
    as_json: flags.AsJson = False,
    no_progress: flags.NoProgress = False,
    verbose: flags.Verbose = False,
) -> Answer:
    """Convert a model inside a budget, save it to a folder, print the report.

    Unfinished work is kept beside OUT, in OUT.structc-work: after Ctrl-C (exit code 5) the same
    command continues. A demand that cannot be met (exit code 3) saves the best result all the same.

    \b
    Examples:
      structc convert model.py:make -o out
      structc convert ./all-MiniLM-L6-v2 -o out --calib texts.txt --budget max_drop=1%
      structc convert model.py:make -o out --budget error=0.05,latency=0.8x --ignore head
    """
    place = Place.checked(out, overwrite=overwrite)
    options: dict[str, Any] = {"ignore": ignore or (), "effort": effort}
    forced = read_config(config)
    from structc.sources import load_source

    allowed = parse_budget(budget)
    text = flags.text_options(calib, seqlen, nsamples, batch_size)
    with progress_bars(wanted=not no_progress) as progress:
        options["progress"] = progress
        if dry_run:
            source = load_source(model, text, trust=trust)
            _tell(source)
            return _dry_run(source, place, _with_metric(allowed, source), forced, options)
        if not resume:
            place.start_over()
        if place.has_work:
            note(f"continuing the work in {place.work}")
        with place.work_in_progress():
            source = load_source(model, text, trust=trust, seed=seed)
            _tell(source)
            options |= {"budget": _with_metric(allowed, source), "config": forced, "seed": seed}
            return _convert(source, place, options, overwrite=overwrite)


def _convert(source: Source, place: Place, options: dict[str, Any], *, overwrite: bool) -> Answer:
    import structc

    unmet = None
    try:
        fast = structc.compile(
            source.model,
            source.example_inputs,
            calibration=source.calibration,
            work_dir=place.work,
            **options,
        )
        report = _report_of(fast)
    except BudgetNotMet as e:
        fast = e.result  # type: ignore[assignment]
        report = _report_of(fast, f"the demand was not met: {str(e).splitlines()[0]}")
        unmet = BudgetNotMet(
            str(e).splitlines()[0],
            result=fast,
            hint=f"The best result is saved in {place.out} all the same. Allow more max_drop or "
            "error, or ask for less.",
        )
    from structc.artifact import save

    save(fast, place.out, overwrite=overwrite)  # not fast.save: the user's class may have its own
    note(f"saved {place.out}")
    return Answer(report.to_dict(), report, error=unmet)


def _report_of(fast: Any, more: str = "") -> Report:
    """The report that is saved with a model, with one sentence more if there is one.

    The user's class may have names of its own that hide ``report``: the handle is never hidden.
    """
    from structc.compiled import handle_of
    from structc.report import Report

    handle = handle_of(fast)
    assert handle is not None
    if more:
        data = handle.report.to_dict()
        handle.report = Report.from_dict({**data, "notes": [*data["notes"], more]})
    return handle.report


def _dry_run(
    source: Source,
    place: Place,
    budget: Budget,
    forced: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Answer:
    """What inspect says, and what a conversion would write."""
    import structc
    from structc.names import select
    from structc.report.words import size

    report = structc.inspect(source.model, source.example_inputs, **options)
    data = report.to_dict()
    known = [s["name"] for s in data["sites"]] + [r["site"] for r in data["refusals"]]
    for pattern in forced:
        if pattern != "_default":
            select(pattern, known, "config")
    tensors = [*source.model.parameters(), *source.model.buffers()]
    most = sum(t.nbytes for t in tensors)
    written = {
        "out": str(place.out),
        "files": list(FILES),
        "weights_bytes_at_most": most,
        "work_dir": str(place.work),
        "budget": budget.to_dict(),
    }
    shown = (
        "Dry run: nothing was written. A conversion would write\n"
        + "\n".join(f"  {place.out / f}" for f in FILES)
        + f"\nwith at most {size(most)} of weights, and keep unfinished work in {place.work}."
    )
    return Answer({"dry_run": written, "report": data}, report, more=shown)


# ---------------------------------------------------------------------------- options


def parse_budget(text: str) -> Budget:
    """A budget from the command line; ``exact`` spends nothing."""
    from structc.budget import Budget

    if not text.strip():
        raise ConfigError("--budget is empty", hint="exact spends nothing; or max_drop=1%.")
    return Budget() if text.strip() == "exact" else Budget.parse(text)


def _with_metric(budget: Budget, source: Source) -> Budget:
    if source.metric is None:
        return budget
    if budget.max_drop is None:
        note("the model's metric is not used: only a budget with max_drop speaks of one")
        return budget
    return replace(budget, metric=source.metric)


def read_config(path: Path | None) -> dict[str, Any]:
    """Forced choices from a JSON file.

    Errors: :class:`ConfigError` for anything but an object of names, families with whole numbers
        and nulls.
    """
    if path is None:
        return {}
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("it is larger than 1 MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"--config {str(path)!r} cannot be read: {e}") from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"--config {str(path)!r}: expected an object, got a {type(found).__name__}",
            hint='Map patterns to choices: {"encoder": "low_rank", "head": null}.',
        )
    for pattern, choice in found.items():
        if not _is_choice(choice):
            raise ConfigError(
                f"--config {str(path)!r}: {pattern!r} asks for {json.dumps(choice)[:80]}",
                hint='A choice is a family\'s name, {"family": "low_rank", "rank": 64} with whole '
                "numbers, or null to keep a layer dense.",
            )
    return found


def _is_choice(choice: Any) -> bool:
    if choice is None or isinstance(choice, str):
        return True
    if not isinstance(choice, dict) or not isinstance(choice.get("family"), str):
        return False
    return all(type(v) is int and v > 0 for k, v in choice.items() if k != "family")


def _tell(source: Source) -> None:
    for sentence in source.notes:
        note(sentence)
