"""One form for every way in which users hand inputs to a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structc.errors import CalibrationError, ConfigError, StructcError
from structc.records import Call


def to_call(value: Any) -> Call:
    """A call from a tensor, a tuple or list of positional arguments, a dict, or (tuple, dict).

    >>> x = torch.ones(2)
    >>> len(to_call((x, x)).args), list(to_call({"x": x}).kwargs)
    (2, ['x'])
    >>> len(to_call(((x,), {"k": 1})).args)
    1
    """
    if isinstance(value, Call):
        return value
    if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__")):
        return Call((), {str(k): value[k] for k in value.keys()})  # noqa: SIM118 (BatchEncoding)
    if isinstance(value, (tuple, list)):
        if len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], dict):
            return Call(value[0], dict(value[1]))
        return Call(tuple(value), {})
    if isinstance(value, Tensor):
        return Call((value,), {})
    raise ConfigError(
        f"inputs: expected a tensor, a tuple, a dict or (tuple, dict), got {type(value).__name__}",
        hint="Wrap a single argument of another type in a tuple: (value,).",
    )


def example_call(model: nn.Module, given: Any = None) -> Call | None:
    """The example that was given, or one that the model brings: transformers and Lightning have
    attributes for it."""
    brought = (getattr(model, name, None) for name in ("dummy_inputs", "example_input_array"))
    return next((to_call(value) for value in (given, *brought) if value is not None), None)


def canonical(model: nn.Module, call: Call) -> Call:
    """The same call with every argument by name, in the order of the signature, defaults left out.

    So ``model(x)``, ``model(x=x)`` and ``model(x, mask=None)`` are one call to a region's guards.

    Errors: :class:`ConfigError` if the arguments do not fit ``model.forward``.
    """
    signature = signature_of(model)
    try:
        bound = signature.bind(*call.args, **call.kwargs)
    except TypeError as e:
        raise ConfigError(
            f"{type(model).__name__}.forward{signature}: {e}",
            hint=f"Given: {describe(call)}.",
        ) from None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    parameters = signature.parameters
    by_name = not any(
        parameters[n].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
        for n in bound.arguments
    )
    if not by_name:
        return Call(bound.args, bound.kwargs)
    for name, value in bound.arguments.items():
        if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            kwargs.update({k: v for k, v in value.items() if v is not None})
        elif not _is_default(value, parameters[name].default):
            kwargs[name] = value
    return Call(args, kwargs)


def signature_of(model: nn.Module) -> inspect.Signature:
    """The signature of ``forward``; a permissive one when it has none that can be read."""
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return inspect.signature(lambda *args, **kwargs: None)


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    plain = (bool, int, float, str)
    return type(value) is type(default) and isinstance(value, plain) and bool(value == default)


def run(model: Callable[..., Any], call: Call) -> Any:
    """``model(*args, **kwargs)``."""
    return model(*call.args, **call.kwargs)


def describe(call: Call) -> str:
    """Arguments with shapes and dtypes, for messages."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return type(value).__name__

    parts = [one(a) for a in call.args] + [f"{k}={one(v)}" for k, v in call.kwargs.items()]
    return f"({', '.join(parts)})"


def clone_call(call: Call) -> Call:
    """A copy whose tensors may be changed without touching the user's."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (call.args, call.kwargs))
    return Call(args, kwargs)


def token_mask(call: Call) -> Tensor | None:
    """The ``(B, T)`` attention mask of a call, if the model is given one."""
    mask = call.kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def calibration_calls(data: Any) -> list[Call]:
    """Calibration data as a list of calls: an iterable, a DataLoader, a callable that returns one,
    or a single batch in any form that :func:`to_call` takes.

    Errors: :class:`CalibrationError` if there is nothing in it.
    """
    try:
        if callable(data) and not isinstance(data, (Mapping, Iterable)):
            data = data()
        if data is None:
            raise CalibrationError(
                "calibration: the callable returned None",
                hint="Return an iterable of batches: tensors, tuples or dicts.",
            )
        calls = list(_each(data))
    except StructcError:
        raise
    except Exception as e:
        raise CalibrationError(
            f"calibration: reading the data failed: {type(e).__name__}: {e}",
            hint="The error comes from the loader or function that was given.",
        ) from e
    if not calls:
        raise CalibrationError(
            "calibration: the data are empty, 0 batches",
            hint="A generator can be read only once: pass a list, or a function that makes it.",
        )
    return calls


def _each(data: Any) -> Iterator[Call]:
    if isinstance(data, (Tensor, Mapping)) or (isinstance(data, tuple) and _is_one_call(data)):
        yield to_call(data)
        return
    try:
        items = iter(data)
    except TypeError:
        raise CalibrationError(
            f"calibration: expected an iterable of batches, got {type(data).__name__}",
            hint="Pass a list or DataLoader of tensors, tuples or dicts, or a function.",
        ) from None
    yield from map(to_call, items)


def _is_one_call(data: tuple[Any, ...]) -> bool:
    if len(data) == 2 and isinstance(data[0], tuple) and isinstance(data[1], dict):
        return True
    return bool(data) and all(isinstance(d, Tensor) for d in data)


def example_of(model: nn.Module, example_inputs: Any) -> Call | None:
    """A call of the model, of its own tensors: a model may write to its inputs."""
    example = example_call(model, example_inputs)
    return None if example is None else clone_call(example)


def required_example(model: nn.Module, example_inputs: Any, caller: str) -> Call:
    """As :func:`example_of`; without any it is a :class:`ConfigError` in the caller's name."""
    example = example_of(model, example_inputs)
    if example is None:
        raise ConfigError(
            f"{caller}: the model brings no example inputs of its own",
            hint="Give example_inputs: a tensor, a tuple, a dict or (tuple, dict).",
        )
    return example
