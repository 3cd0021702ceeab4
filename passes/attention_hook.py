"""Attention that no graph has, through the hook that transformers offers: decoders with a cache."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn

from structc.attention_records import AttentionSite
from structc.records import Refusal
from structc.softmax import Softmax


def hooked(site: AttentionSite, tree: nn.Module, cause: str) -> AttentionSite:
    """A site of a graph that is only read, if its module can be told to attend another way.

    Args:
        cause: why the tree as a whole cannot, or ``""``.

    rewrite:       sdpa in the module's code  -->  structc::attention(q, k, v, ..., form)
    Sound because: transformers itself hands queries, keys, values and mask to the function that a
        name stands for; a mask counts only by how transformers made it, at each call
        (:mod:`structc.transformers_attention`), and what is not known goes to the function that
        served before.
    Skips when:    the model is not from transformers or does not attend by ``"sdpa"``; its code
        asks for that name; scores are biased or capped.
    """
    case = site.case
    assert case is not None
    if case.mask or case.lags or case.sink or not case.fused:
        cause = cause or "its scores are not plain, and no graph of its module could be exported"
    if not cause and not isinstance(_module(tree, site.name), nn.Module):
        cause = "no module of that name"
    if cause:
        refusal = Refusal(site.name, "attention", "NOT_EXPORTED", cause)
        return replace(site, case=None, refusal=refusal)
    form = Softmax.parse(case.form)
    short = form.window >= case.keys
    form = replace(form, window=0) if short else form
    padded = case.padded and site.mask_kind not in ("causal", "sliding_window", "all_true")
    plain = not form.window and not form.offset and not padded
    case = replace(
        case,
        form=str(form),
        padded=padded,
        masked=not plain,
        repeated=not plain,
        torch_causal=form.causal if plain else None,
    )
    return replace(site, case=case, hooked=True)


def hook_refused(tree: nn.Module) -> str:
    """Why a model's attention cannot go through the interface; ``""`` if it can."""
    none = "no graph of its module could be exported"
    models = _models(tree)
    if not models:
        return none
    from transformers import modeling_utils as theirs

    if any(c._attn_implementation != "sdpa" for c in _configs(tree)):
        return f"{none}, and it does not attend by 'sdpa'"
    for module in {type(m).__module__ for m in tree.modules()}:
        code = sys.modules.get(module)
        known = vars(code).get("ALL_ATTENTION_FUNCTIONS") if code else None
        if known is not None and known is not theirs.ALL_ATTENTION_FUNCTIONS:
            return f"{none}, and {module} has attention functions of its own"
        if known is not None and '"sdpa"' in inspect.getsource(code):  # type: ignore[arg-type]
            return f"{none}, and {module} asks which attention it has"
    if not all(m._can_set_attn_implementation() for m in models):
        return f"{none}, and its attention cannot be set"
    return ""


def use_hook(tree: nn.Module, names: Collection[str]) -> None:
    """Let attention of some modules go to structc. The tree gets configurations of its own."""
    from structc import transformers_attention as ours

    ours.register()
    twins: dict[int, Any] = {}  # what is one object stays one
    for module in tree.modules():
        for name, value in module.__dict__.items():
            if _is_config(value):
                module.__dict__[name] = copy.deepcopy(value, twins)
    for model in _models(tree):
        model.set_attn_implementation(ours.NAME)
    for name in names:
        attends = _module(tree, name)
        if attends is not None:
            attends.__dict__[ours.MARK] = True


def _module(tree: nn.Module, site: str) -> nn.Module | None:
    """The module of a site; several attentions of one module are numbered."""
    try:
        return tree.get_submodule(site.partition("#")[0])
    except AttributeError:
        return None


def _models(tree: nn.Module) -> list[Any]:
    """Models of transformers in a tree, the outermost ones."""
    theirs = sys.modules.get("transformers.modeling_utils")
    if theirs is None:
        return []
    found: list[Any] = []
    inside: set[int] = set()
    for module in tree.modules():
        if isinstance(module, theirs.PreTrainedModel) and id(module) not in inside:
            found.append(module)
            inside |= {id(m) for m in module.modules()}
    return found


def _configs(tree: nn.Module) -> list[Any]:
    values = [v for m in tree.modules() for v in m.__dict__.values() if _is_config(v)]
    return list({id(v): v for v in values}.values())


def _is_config(value: object) -> bool:
    theirs = sys.modules.get("transformers.configuration_utils")
    return theirs is not None and isinstance(value, theirs.PreTrainedConfig)
