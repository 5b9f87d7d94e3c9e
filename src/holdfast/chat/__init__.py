"""Conversations: reading turns in the formats of today's files, rendering them, and tokenizers."""

from __future__ import annotations

__all__ = ["limits", "rendering", "tokenizers", "turns"]
