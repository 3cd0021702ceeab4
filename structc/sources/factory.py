"""``file.py:factory``: run the file that the user named, and call the function that they named."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from structc.errors import ConfigError, StructcError
from structc.inputs import calibration_calls, example_call
from structc.sources.source import Source

KEYS = ("model", "example_inputs", "calibration", "metric")
RETURNS = (
    "A factory returns the model, (model, example_inputs[, calibration[, metric]]), or a dict with "
    "the keys model, example_inputs, calibration, metric."
)


def from_factory(file: Path, function: str) -> Source:
    """The source that ``function()`` of a Python file returns.

    Errors: :class:`ConfigError` saying where the user's code failed, or what it returned.
    """
    where = f"{file}:{function}"
    if not file.is_file():
        raise ConfigError(
            f"MODEL {where!r}: there is no file {str(file)!r}",
            hint="Give the path of a Python file, a colon, and the name of a function in it.",
        )
    if not function.isidentifier():
        raise ConfigError(
            f"MODEL {where!r}: {function!r} is not the name of a function",
            hint="Write file.py:NAME, where NAME is a function at the top level of the file.",
        )
    module = _run_file(file, where)
    if function not in vars(module):
        raise _no_such(where, function, module)
    found = vars(module)[function]
    if isinstance(found, nn.Module):
        return _source(where, found)
    if not callable(found):
        raise ConfigError(
            f"MODEL {where!r}: expected a function, got {type(found).__name__}", hint=RETURNS
        )
    with _user_code(where, "calling it without arguments"):
        made = found()
    return _source(where, made)


def _run_file(file: Path, where: str) -> ModuleType:
    """The file as a module; its folder is importable, as when Python runs a script."""
    name = f"structc_source_{''.join(c if c.isalnum() else '_' for c in file.stem)}"
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None and spec.loader is not None  # a name that ends in .py has a loader
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[name] = module  # dataclasses and torch.export look a class's module up there
    with _user_code(where, "running the file"):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _user_code(where: str, doing: str) -> Iterator[None]:
    """Whatever the user's code raises becomes one sentence with the line that raised it."""
    try:
        yield
    except StructcError:
        raise
    except (Exception, SystemExit) as e:
        raise ConfigError(
            f"MODEL {where!r}: {doing} raised {type(e).__name__}: {e}{_place(e)}",
            hint="The traceback is shown with -v.",
        ) from e


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return ""  # its text names the line
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _no_such(where: str, function: str, module: ModuleType) -> ConfigError:
    own = [
        n
        for n, v in vars(module).items()
        if callable(v) and not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
    ]
    near = difflib.get_close_matches(function, own, n=1, cutoff=0.5)
    did = f"Did you mean {near[0]!r}? " if near else ""
    return ConfigError(
        f"MODEL {where!r}: the file has no function {function!r}",
        hint=f"{did}Functions in it: {', '.join(own[:8]) or 'none'}.",
    )


def _source(where: str, made: Any) -> Source:
    """Check what a factory returned, piece by piece."""
    values = _by_name(where, made)
    model = values["model"]
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"MODEL {where!r}: expected a torch.nn.Module as the model, got {_kind(model)}",
            hint=RETURNS,
        )
    metric = values.get("metric")
    if metric is not None and not callable(getattr(metric, "measure", metric)):
        raise ConfigError(
            f"MODEL {where!r}: expected a function metric(model) -> float, got {_kind(metric)}",
            hint="Higher is better; structc.metrics has measures that need no labels.",
        )
    example = values.get("example_inputs")
    if example_call(model, example) is None:
        raise ConfigError(
            f"MODEL {where!r}: there are no example inputs, and the model has no dummy_inputs",
            hint="Return (model, example_inputs): a tensor, a tuple, a dict or (tuple, dict).",
        )
    calibration = values.get("calibration")
    if calibration is not None:  # read once: a generator would be empty the second time
        with _user_code(where, "reading its calibration data"):
            calibration = calibration_calls(calibration)
    return Source(model, example, calibration, metric)


def _by_name(where: str, made: Any) -> dict[str, Any]:
    if isinstance(made, dict):
        odd = [str(k) for k in made if k not in KEYS]
        if odd or "model" not in made:
            what = f"unknown key {odd[0]!r}" if odd else "no key 'model'"
            raise ConfigError(f"MODEL {where!r}: the dict that came back has {what}", hint=RETURNS)
        return dict(made)
    if isinstance(made, tuple):
        if not 1 <= len(made) <= len(KEYS):
            raise ConfigError(
                f"MODEL {where!r}: expected a tuple of 1 to {len(KEYS)}, got {len(made)} items",
                hint=RETURNS,
            )
        return dict(zip(KEYS, made, strict=False))
    return {"model": made}


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
