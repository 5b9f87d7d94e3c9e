"""Conversations: reading turns in the formats of today's files, and rendering them with a chat template."""

from __future__ import annotations

__all__ = ["limits", "rendering", "turns"]
