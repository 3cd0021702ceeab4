"""Shallow clones: a module tree of its own over somebody else's parameters."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_TABLES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def clone_tree(model: nn.Module) -> nn.Module:
    """A copy of a module tree that shares every parameter and copies every buffer.

    Modules that appear twice appear twice in the clone too. Attributes that hold modules of the
    tree, alone, in lists, tuples or dicts, or as bound methods, point into the clone. All other
    attributes are shared, and so are scripted and traced modules, which have no Python state.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> twin = clone_tree(model)
    >>> twin[0] is model[0], twin[0].weight is model[0].weight
    (False, True)
    """
    twins: dict[int, nn.Module] = {}
    buffers: dict[int, torch.Tensor] = {}
    originals = python_modules(model)
    for module in originals:
        # not the class's own __new__: a GraphModule's makes a new class, without its forward
        twin = object.__new__(module.__class__)
        twin.__dict__.update(module.__dict__)
        for table in _TABLES:
            if table in module.__dict__:
                twin.__dict__[table] = module.__dict__[table].copy()
        twins[id(module)] = twin
    for module in originals:
        twin = twins[id(module)]
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else twins.get(id(child), child)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                copy = buffers.setdefault(id(buffer), buffer.detach().clone())
                twin._buffers[name] = copy
        for name, value in module.__dict__.items():
            if name not in _TABLES:
                twin.__dict__[name] = _point_into(value, twins)
            elif "hooks" in name:
                twin.__dict__[name].update({k: _point_into(f, twins) for k, f in value.items()})
    return twins[id(model)]


def python_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a tree, each once, without those that are scripted or traced."""
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module | None) -> None:
        if module is None or id(module) in found or isinstance(module, torch.jit.ScriptModule):
            return
        found[id(module)] = module
        for child in module._modules.values():
            visit(child)

    visit(model)
    return list(found.values())


def set_modes(model: nn.Module, training: bool) -> list[tuple[nn.Module, bool]]:
    """Set the flags of a tree's Python modules, and return those there were.

    ``train()`` and ``eval()`` are the user's own code, which may change weights: layers with
    adapters merge them there.
    """
    before = [(m, m.training) for m in python_modules(model)]
    for module, _ in before:
        module.training = training
    return before


def _point_into(value: Any, twins: Mapping[int, nn.Module]) -> Any:
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in twins:
        new = twins[id(value.__self__)]
        if type(new) is type(value.__self__):
            return types.MethodType(value.__func__, new)
        return getattr(new, value.__func__.__name__, value)
    if type(value) in (list, tuple):
        moved = [_point_into(v, twins) for v in value]
        changed = any(a is not b for a, b in zip(moved, value, strict=True))
        return type(value)(moved) if changed else value
    if type(value) is dict:
        pairs = {k: _point_into(v, twins) for k, v in value.items()}
        return pairs if any(pairs[k] is not value[k] for k in value) else value
    return value


def replace_modules(tree: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of those so named, wherever the tree or its attributes hold them."""
    moved = {id(tree.get_submodule(name)): module for name, module in new.items()}
    if not moved:
        return
    for parent in python_modules(tree):
        for key, child in parent._modules.items():
            parent._modules[key] = moved.get(id(child), child)
        for key, value in parent.__dict__.items():
            if key not in _TABLES:
                parent.__dict__[key] = _point_into(value, moved)
