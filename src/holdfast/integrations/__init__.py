"""Plug-ins for other tools: PEFT, TRL, axolotl, ms-swift, lm-evaluation-harness, inspect_ai.

Each file imports its host inside functions; only `inspect_ai.py`, which that host imports, does so at its
top.
"""

__all__ = ["lm_eval", "peft", "prompt_sets", "trl"]
