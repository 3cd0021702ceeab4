"""Patterns that name modules: exact names, ``re:`` patterns, and near-misses when nothing fits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from structc.errors import ConfigError


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names this site.

    A plain pattern matches the name itself, a whole prefix of it (``encoder`` matches
    ``encoder.layer.0``) or a whole suffix (``lm_head``); ``re:`` starts a regular expression that
    must match all of the name.

    >>> matches("lm_head", "model.lm_head"), matches("re:.*mlp.*", "h.0.mlp.up")
    (True, True)
    >>> matches("up", "cup")
    False
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as e:
            raise ConfigError(
                f"pattern {pattern!r} is not a regular expression: {e}",
                hint="Escape dots and brackets, or leave 're:' away to match a plain name.",
            ) from None
    return name == pattern or name.startswith(f"{pattern}.") or name.endswith(f".{pattern}")


def select(pattern: str, names: Iterable[str], option: str) -> list[str]:
    """All names that a pattern matches; an error with near-misses when there are none."""
    names = list(names)
    found = [n for n in names if matches(pattern, n)]
    if not found:
        raise no_match(option, pattern, names)
    return found


def no_match(option: str, pattern: str, names: Iterable[str]) -> ConfigError:
    """The error for a pattern that matches nothing, with the names that come nearest."""
    names = list(names)
    pool = {*names, *(n.rsplit(".", 1)[-1] for n in names)}
    near = difflib.get_close_matches(pattern.removeprefix("re:"), sorted(pool), n=3, cutoff=0.5)
    did = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    sample = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return ConfigError(
        f"{option}: pattern {pattern!r} matches none of the {len(names)} linear sites",
        hint=f"{did}Sites here: {sample or 'none'}. Patterns are names, or 're:' and a regex.",
    )
