"""``structc bench``: how fast an artifact, a model or the kernels of this machine are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from structc.cli import flags
from structc.cli.check import MaybeAgainst, Rounds, saved_report
from structc.cli.place import MANIFEST
from structc.cli.session import Answer, command, note
from structc.cli.timed import example_of, table, timed_rows
from structc.errors import ConfigError
from structc.progress import named, progress_bars

if TYPE_CHECKING:
    from structc.codegen.peaks import Peaks
    from structc.sources.source import TextOptions

KERNELS = "Kernels (structc bench kernels | triton)"


@command
def bench(
    what: Annotated[
        str,
        typer.Argument(
            metavar="OUT|MODEL|kernels|triton",
            help="An artifact, a model, or the word kernels or triton.",
            show_default=False,
        ),
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
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16|both", rich_help_panel=KERNELS)
    ] = "float32",
    rows: Annotated[
        str, typer.Option(metavar="N,N,...", help="Rows of a call.", rich_help_panel=KERNELS)
    ] = "1,16,128,1024",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="PyTorch's, by default.", rich_help_panel=KERNELS),
    ] = None,
    effort: Annotated[
        str, typer.Option(metavar="quick|full|60s", rich_help_panel=KERNELS)
    ] = "quick",
    as_json: flags.AsJson = False,
    no_progress: flags.NoProgress = False,
    verbose: flags.Verbose = False,
) -> Answer:
    """Time an artifact against eager PyTorch and torch.compile, in turns, on the example inputs.

    A model alone: its dense versions. The word kernels: each form on this machine, against dense.
    The word triton: kernels for GPUs, compiled (no GPU is needed), with what they take of each.

    \b
    Examples:
      structc bench out --against model.py:make
      structc bench model.py:make --rounds 21 --json
      structc bench kernels --dtype both --rows 128,1024
      structc bench triton --dtype bfloat16 --effort full
    """
    if what == "triton":
        from structc.cli.bench_triton import triton_table

        return triton_table(dtype, every=effort == "full", no_progress=no_progress)
    if what == "kernels":
        return _kernels(dtype, rows, threads, effort, no_progress=no_progress)
    text = flags.text_options(None, seqlen, None, batch_size)
    return _versions(what, against, text, rounds, torch_compile=torch_compile, trust=trust)


def _versions(
    what: str,
    against: str | None,
    text: TextOptions,
    rounds: int,
    *,
    torch_compile: bool,
    trust: bool,
) -> Answer:
    """The answer for an artifact or a model."""
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
    from structc.passes.verify import baselines, caller
    from structc.sources import load_source

    source = load_source(what if against is None else against, text, trust=trust)
    source.model.eval()
    fast = None if against is None else structc.load(what, source.model)
    example = example_of(source)
    calls, notes = baselines(source.model, example, compiled=torch_compile)
    if fast is not None:
        calls["structc"] = caller(fast, example)
    for sentence in notes:
        note(sentence)
    timed = timed_rows(calls, rounds)
    data = {
        "model": what if against is None else against,
        "artifact": None if against is None else what,
        "inputs": describe(example),
        "target": target().to_dict(),
        "latency": timed,
        "notes": notes,
    }
    return Answer(data, "\n".join([f"inputs {describe(example)}", "", *table(timed)]))


def _kernels(
    dtype: str, rows: str, threads: int | None, effort: str, *, no_progress: bool
) -> Answer:
    """The answer of ``structc bench kernels``."""
    import torch

    from structc.codegen import kernel_table
    from structc.codegen import peaks as peaks_of
    from structc.hardware import target
    from structc.options import effort_of

    level, seconds = effort_of(effort)
    names = ("float32", "bfloat16") if dtype == "both" else (dtype,)
    if not set(names) <= {"float32", "bfloat16"}:
        raise ConfigError(f"--dtype must be float32, bfloat16 or both, got {dtype!r}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        peaks = peaks_of.known()
        if peaks.source == "assumed":
            note("measuring what this machine can do (structc tune --peaks)")
            peaks = peaks_of.measure()
        wanted = [c for n in names for c in kernel_table.cases(getattr(torch, n), _rows(rows))]
        with progress_bars(wanted=not no_progress) as progress:
            found = kernel_table.table(
                wanted, peaks, effort=level, seconds=seconds, progress=named(progress, "kernels")
            )
        machine = target().to_dict()
    finally:
        torch.set_num_threads(before)
    data = {"target": machine, "peaks": asdict(peaks), "kernels": found}
    head = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    return Answer(data, "\n".join([head, peaks_line(peaks), "", *_kernel_lines(found)]))


def _rows(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--rows must be whole numbers joined by commas, got {text!r}")
    return tuple(int(part) for part in parts)


def _kernel_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    wide = max(len(r["case"]) for r in rows)
    head = (
        f"{'case':<{wide}} {'rows':>5} {'dtype':<8} {'ms':>9} {'dense ms':>9} {'x dense':>8} "
        f"{'ratio':>6} {'effic.':>6} {'GFLOP/s':>8} {'peak':>5} {'spread':>6}  kernel, baseline"
    )
    return [head, *(_line(r, wide) for r in rows)]


def _line(r: Mapping[str, Any], wide: int) -> str:
    start = f"{r['case']:<{wide}} {r['rows']:>5} {r['dtype']:<8}"
    if "refused" in r:
        return f"{start} {r['refused']}"
    return (
        f"{start} {r['latency_ms']:>9.4g} {r['baseline_ms']:>9.4g} {r['speedup']:>8.2f} "
        f"{r['ratio']:>6.1f} {r['efficiency']:>6.2f} {r['gflops']:>8.1f} {r['share']:>5.0%} "
        f"{r['spread']:>6.1%}  {r['kernel']}, {r['baseline']}"
    )


def peaks_line(peaks: Peaks) -> str:
    """Peaks as people read them."""
    return (
        f"peaks: {peaks.gflops:.0f} GFLOP/s float32, {peaks.gflops_bf16:.0f} bfloat16, "
        f"{peaks.gb_per_s:.0f} GB/s"
    )
