"""Attention methods: one file each, mathematics only."""

from __future__ import annotations

from structc.attention.exact import exact

__all__ = ["exact"]
