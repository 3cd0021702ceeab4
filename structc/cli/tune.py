"""``structc tune``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from structc.cli import flags
from structc.cli.bench import peaks_line
from structc.cli.convert import inspected
from structc.cli.session import Answer, command
from structc.errors import ConfigError

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="file.py:factory, a Hugging Face folder on disk, or with --trust a .pt2 file.",
        show_default=False,
    ),
]
Peaks = Annotated[
    bool, typer.Option("--peaks", help="Measure what this machine can do: predictions use it.")
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="GPU",
        help="Compile the model's kernels for a GPU that is not here: cuda:80, cuda:90, "
        "cuda:100 or hip:gfx942.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="BUNDLE",
        help="With --target: the folder to write.",
        show_default=False,
    ),
]
Artifact = Annotated[
    Path | None,
    typer.Option(
        "--artifact",
        metavar="OUT",
        help="With --target: MODEL as it was converted to OUT.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="With --target: as if the model were in this dtype.",
        show_default=False,
    ),
]


@command
def tune(
    model: Model = None,
    peaks: Peaks = False,
    target: Target = None,
    out: Out = None,
    artifact: Artifact = None,
    dtype: Dtype = None,
    effort: flags.Effort = "quick",
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
    """Measure beforehand what converting a model will ask for; later conversions find it.

    With --target, compile the kernels that the converted model calls for a GPU: no GPU is needed,
    and the machine with the GPU needs no compiler: structc.use_bundle("BUNDLE").

    \b
    Examples:
      structc tune --peaks
      structc tune model.py:make
      structc tune ./all-MiniLM-L6-v2 --seqlen 128 --effort full
      structc tune model.py:make --artifact out --target cuda:90 --dtype bfloat16 -o bundle
    """
    if model is None and not peaks:
        raise ConfigError("tune: nothing to do", hint="Name a MODEL, or give --peaks.")
    text = flags.text_options(calib, seqlen, nsamples, batch_size)
    if target is not None and model is not None:
        from structc.cli.tune_bundle import bundle_answer

        return bundle_answer(
            model, artifact, target, out, text, dtype=dtype, trust=trust, no_progress=no_progress
        )
    if target or out or artifact or dtype:
        raise ConfigError(
            "--out, --artifact and --dtype are for --target, which compiles a MODEL's kernels",
            hint="structc tune MODEL --target cuda:90 -o BUNDLE",
        )
    data: dict[str, Any] = {}
    lines: list[str] = []
    if peaks:
        from structc.codegen import peaks as peaks_of

        measured = peaks_of.measure()
        data["peaks"] = asdict(measured)
        lines.append(peaks_line(measured))
    if model is None:
        return Answer(data, "\n".join(lines))
    report = inspected(model, text, effort, ignore, trust=trust, no_progress=no_progress)
    found = report.to_dict()
    sites = found["sites"]
    priced = {(c["form"], s["rows"], s["dtype"]) for s in sites for c in s["candidates"]}
    faster = sum(s["fastest"] is not None for s in sites)
    data["report"] = found
    lines.append(
        f"{len(priced)} forms priced for {len(sites)} layers, {faster} of which have a structured "
        "form that is faster than dense"
    )
    lines += ["", str(report)]
    return Answer(data, "\n".join(lines))
