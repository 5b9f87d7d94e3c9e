"""Plug-ins for other tools: PEFT, TRL, axolotl, ms-swift; each file imports its host inside functions."""

__all__ = ["peft", "trl"]
